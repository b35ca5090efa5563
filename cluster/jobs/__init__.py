"""Batch jobs: input rows, journal, output, progress."""
