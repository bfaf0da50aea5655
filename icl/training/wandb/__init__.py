"""Weights & Biases: the log of a run that trains, and the agent of a sweep."""
