"""Plans as files and pictures."""
