"""Compare the speed of `icl` with other programs (see `python -m benchmarks --help`)."""
