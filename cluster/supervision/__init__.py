"""Membership of workers: health, epochs, replacement."""
