"""Checkpoints of older code bases: read them safely, and convert them to a run's folder."""
