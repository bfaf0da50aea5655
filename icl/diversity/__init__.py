"""The task-diversity experiment (Raventos et al. 2023, arXiv 2306.15063): runs that differ only in M, which is 2, 4, 8, ... or infinity."""
