"""Sampling on the host and on the device."""
