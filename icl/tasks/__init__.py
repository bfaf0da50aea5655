"""Data of a run: priors of task vectors, prompts, out-of-distribution shifts of prompts, and rows of tokens."""
