"""`shoal bench`: throughput and kernel benchmarks, and rooflines."""
