"""Supervision of workers: detection of losses, epochs, replacement."""
