"""Training runs with Lightning; nothing else in `icl` imports it."""
