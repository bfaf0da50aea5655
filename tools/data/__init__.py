"""Programs that make the tables of `data/`, from which the figures are drawn (`python -m tools.data small`, or `make data`)."""
