"""Decoder models: the family table (NumPy only) and the Cells that run them (MindSpore)."""
