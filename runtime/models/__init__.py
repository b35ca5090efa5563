"""Model architectures that the runtime can load."""
