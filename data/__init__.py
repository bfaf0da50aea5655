"""The small tables that the figures are drawn from, and what makes them: `python -m data small`, or `make data`."""
