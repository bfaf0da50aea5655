"""The task-diversity experiment (Raventos et al. 2023, arXiv 2306.15063).

Its runs differ only in the number of tasks M, which is 2, 4, 8, ... or infinity.
"""
