"""W&B sweep files without an account: reading them, listing their points, and running the points on any number of machines."""
