"""Runs: their directories, one reader of what they log, progress, curves, and the look of every figure."""
