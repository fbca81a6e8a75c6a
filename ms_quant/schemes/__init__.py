"""The schemes as data."""
