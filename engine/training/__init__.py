"""One training step, and the run that repeats it."""
