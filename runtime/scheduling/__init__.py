"""Continuous batching: sequences, scheduler, cache blocks."""
