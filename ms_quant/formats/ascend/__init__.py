"""The ascend checkpoint format."""
