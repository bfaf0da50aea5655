"""Tasks: priors of task vectors, prompts, and out-of-distribution shifts of prompts."""
