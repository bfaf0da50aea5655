"""Computation with tensors: one optimiser step, compiling, threads, memory, linear algebra."""
