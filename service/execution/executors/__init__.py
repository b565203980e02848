"""Ways to run an attempt."""
