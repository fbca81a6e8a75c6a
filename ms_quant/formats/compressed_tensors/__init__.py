"""The compressed-tensors checkpoint format."""
