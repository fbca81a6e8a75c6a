"""The golden-stick checkpoint format."""
