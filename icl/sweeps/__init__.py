"""Run W&B sweep files without a W&B account: list the points (combinations of settings), and run them on any number of machines."""
