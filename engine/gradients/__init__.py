"""Gradients of one chunk only."""
