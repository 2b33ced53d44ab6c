"""Validation dumps read back: what checkpoints can do."""
