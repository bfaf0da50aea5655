"""Small tables from which the figures are drawn, and the scripts that make them (`python -m data small`, or `make data`)."""
