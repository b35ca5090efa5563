"""Request routing: pure decisions, no I/O."""
