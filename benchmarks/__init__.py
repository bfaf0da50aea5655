"""Compare the speed of `icl` with that of other programs (see `python -m benchmarks --help`)."""
