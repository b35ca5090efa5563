"""Ray actors that each host one rank of a replica."""
