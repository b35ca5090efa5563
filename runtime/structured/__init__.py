"""Structured output: answers that have the form a request asks for."""
