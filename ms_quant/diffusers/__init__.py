"""Transformers of diffusers on disk: quantized file to file, and proved; no network is built."""
