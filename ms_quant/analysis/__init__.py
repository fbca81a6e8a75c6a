"""What hurts: how sensitive a model is to each scheme, group by group."""
