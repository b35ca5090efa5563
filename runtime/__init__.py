"""One model replica, SPMD: requests in, tokens out. Knows nothing of Ray or YAML."""
