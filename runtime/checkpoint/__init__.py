"""Checkpoint files: headers, shards, slices of tensors, fingerprint."""
