"""A run on disk: its folder, checkpoints and measurements, the lock of the folder, and the run's copy in a store."""
