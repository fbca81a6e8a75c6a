"""Perplexity and generation of any checkpoint."""
