"""Checkpoint files: headers, slices, checks."""
