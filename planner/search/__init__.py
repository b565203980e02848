"""Which schedule to take."""
