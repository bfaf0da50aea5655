"""Training of runs with Lightning. No other package of `icl` imports Lightning."""
