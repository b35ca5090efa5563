"""Replicas on machines: Ray workers, routing, batch jobs and the command line."""
