"""Runs read back: curves, tables."""
