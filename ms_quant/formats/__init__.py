"""What each checkpoint format holds."""
