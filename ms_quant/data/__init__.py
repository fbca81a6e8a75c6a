"""Texts, records and tokens become windows of token ids."""
