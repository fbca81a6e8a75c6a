"""How a budget is divided among the parts of a model."""
