"""What can be asked of the planner."""
