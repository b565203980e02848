"""One step, watched on tensors without storage."""
