"""Ratios against peers; see `python -m benchmarks --help`."""
