"""Bytes on disk: safetensors, JSON, atomic files."""
