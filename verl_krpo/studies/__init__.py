"""Estimators on simulated rewards, estimators and losses in training: every study returns a table."""
