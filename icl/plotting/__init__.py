"""Figures: one module per family, each a function from tables to a matplotlib figure."""
