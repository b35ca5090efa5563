"""Replicas of a model: start-up, the pool that serves requests, in-process and threaded engines."""
