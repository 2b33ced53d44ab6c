"""The estimators on simulated rewards: every study writes a CSV and figures and returns a table."""
