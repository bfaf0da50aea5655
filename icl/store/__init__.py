"""Keyed bytes in a folder or a bucket; a store knows nothing of runs."""
