"""Proof that a checkpoint is right."""
