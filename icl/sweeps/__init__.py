"""Sweeps without an account: W&B's sweep files, their points, and an engine that runs them on any number of machines."""
