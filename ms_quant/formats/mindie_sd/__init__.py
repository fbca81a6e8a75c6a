"""The mindie-sd checkpoint format."""
