"""Rollouts of a verl job read again, under every estimator."""
