"""What attempts say, and what becomes of it."""
