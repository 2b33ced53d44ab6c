"""Runs: their directories, one reader of what they log, progress and curves."""
