"""Plans: computed in a warm worker process, content-addressed, immutable."""
