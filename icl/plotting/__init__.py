"""Functions that draw figures from tables, with one module for each kind of figure."""
