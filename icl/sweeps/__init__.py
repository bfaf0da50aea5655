"""Run W&B sweep files without a W&B account: read the files, list their points, and run the points on any number of machines."""
