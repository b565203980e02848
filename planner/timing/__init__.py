"""Seconds from FLOPs, bytes and links."""
