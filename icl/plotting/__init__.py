"""Figures, with one module for each kind of figure. Functions draw them from tables."""
