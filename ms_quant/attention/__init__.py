"""Attention of diffusion transformers, quantized and sparse, defined in NumPy. docs/attention.md

Inside, queries, keys and values are float32 (batch, heads, length, size); a mask that is true,
or 1, keeps. What the vendor's pages leave open is marked "open" where it is decided.
"""
