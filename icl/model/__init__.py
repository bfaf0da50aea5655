"""The models: their definitions, a fast form for many models at once, flat parameters, losses, and attention on CPUs."""
