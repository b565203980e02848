"""Margins learned from measured runs, and how far a run was from its plan."""
