"""Estimators on simulated rewards: every study returns a table."""
