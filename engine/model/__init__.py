"""Models of transformers, unmodified: loading, parts, tasks, adapters."""
