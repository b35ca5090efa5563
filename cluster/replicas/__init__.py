"""Replicas of a model: start, routing I/O, in-process and threaded engines."""
