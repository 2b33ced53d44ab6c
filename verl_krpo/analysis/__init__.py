"""Runs read back: curves, tables, studies."""
