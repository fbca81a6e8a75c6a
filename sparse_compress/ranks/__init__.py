"""The tensors of a runtime's ranks."""
