"""The task-diversity experiment (Raventos et al. 2023, arXiv 2306.15063): runs with M = 2, 4, 8, ... and infinity, otherwise equal."""
