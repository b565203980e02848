"""The trainer as a process: its heap, its device, its parent."""
