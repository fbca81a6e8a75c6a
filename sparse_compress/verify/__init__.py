"""Proof that a compressed checkpoint is right."""
