"""Tasks that people quote: questions on disk, prompts of the field, what a model answers."""
