"""What will be done to which linear."""
