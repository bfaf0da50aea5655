"""Losses, gaps and scores on fixed sets of prompts; predictions for prompts of your own."""
