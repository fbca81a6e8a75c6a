"""Resumable work on disk."""
