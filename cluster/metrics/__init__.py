"""What Shoal exports about its requests and engines, to Prometheus and to Ray's metrics."""
