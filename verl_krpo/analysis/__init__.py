"""Rollouts and validation dumps read back: replay, evaluation."""
