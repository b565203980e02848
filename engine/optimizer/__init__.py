"""Updates of the active chunk, and where its states live."""
