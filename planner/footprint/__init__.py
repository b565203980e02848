"""From traces to bytes over time."""
