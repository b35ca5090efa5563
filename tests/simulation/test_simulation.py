"""Whole clusters, killed and frozen at every point, in weather of every kind; see `run`."""

from __future__ import annotations

import os

import pytest

from .run import run

pytestmark = pytest.mark.slow

NUM_PARTS = 10
SEEDS = range(*map(int, os.environ.get("SHOAL_SEEDS", "0:4000").split(":")))
"""First and end, to run more or a single one: SHOAL_SEEDS=17:18."""


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_nothing_is_lost_and_nothing_changes(part: int) -> None:
    for seed in SEEDS[part::NUM_PARTS]:
        run(seed)


def test_a_seed_stands_for_one_run() -> None:
    assert [run(seed) for seed in range(20)] == [run(seed) for seed in range(20)]


def test_what_can_happen_happens() -> None:
    """Or the rest would prove little."""
    outcomes = [run(seed) for seed in range(200)]
    assert sum(o.num_lives > 1 for o in outcomes) > 20
    assert sum(o.num_losses > 1 for o in outcomes) > 20
    assert sum(o.num_replays > 0 for o in outcomes) > 50
    assert sum(o.num_failed_transfers > 0 for o in outcomes) > 10
