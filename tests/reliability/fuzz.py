"""Damage the files that `icl` writes, in thousands of ways, and see that every reader refuses them in one sentence."""
