"""`python -m tests.simulation SEED [END]`: one run, or all from SEED to END, and what happened in them."""

from __future__ import annotations

import sys
import time

from .run import run


def main(first: int, end: int | None = None) -> None:
    begin = time.monotonic()
    seeds = range(first, first + 1 if end is None else end)
    for seed in seeds:
        outcome = run(seed)
        if end is None:
            print(outcome)
    print(f"{len(seeds)} runs, {len(seeds) / (time.monotonic() - begin):.0f} per second")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
