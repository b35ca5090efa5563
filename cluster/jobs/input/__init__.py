"""Inputs of batch jobs: files, formats, and rows that are not checked yet."""
