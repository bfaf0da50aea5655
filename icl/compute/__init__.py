"""How tensors are computed: one optimiser step, compiling, threads, memory, linear algebra."""
