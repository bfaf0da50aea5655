"""Figures, with one module per family. A function makes each figure from tables."""
