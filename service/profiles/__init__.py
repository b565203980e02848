"""What finished jobs measured, and how far it was from the plan."""
