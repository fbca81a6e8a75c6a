"""What a runtime will do with a checkpoint, as a dry run: the rules of each runtime, as code."""
