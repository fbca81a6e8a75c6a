"""From a command to a compressed checkpoint."""
