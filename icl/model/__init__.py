"""The transformer: its definition, the fast form for many members, parameters as rows, attention on CPUs."""
