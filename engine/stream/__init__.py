"""A model's parameters as one sequence, cut into chunks, and the schedule that visits them."""
