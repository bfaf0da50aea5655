"""Losses, gaps and scores on fixed sets of prompts, and predictions for a user's own prompts."""
