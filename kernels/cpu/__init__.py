"""The CPU tier: C++ sources, compiled once per machine, whose results depend on a row's own inputs alone."""
