"""Datasets to verl parquet, one file a dataset."""
