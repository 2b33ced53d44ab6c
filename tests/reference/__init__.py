"""Oracles: the same quantities by other roads, slow and plain."""
