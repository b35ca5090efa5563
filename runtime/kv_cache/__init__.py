"""The paged KV cache and its transfer between replicas."""
