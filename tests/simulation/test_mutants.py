"""The simulation sees every defect that is put in."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.simulation import mutants

from .run import run

pytestmark = pytest.mark.slow

NUM_SEEDS = 1000
"""Within so many it must be seen; it takes 150 at most, and most need a few."""


@pytest.mark.parametrize(
    "mutant",
    [
        mutants.records_are_not_checked,
        mutants.a_preempted_load_goes_on,
        mutants.records_count_before_they_are_written,
        mutants.an_export_is_released_when_it_is_complete,
        mutants.an_export_is_never_released,
        mutants.what_was_generated_is_forgotten_when_the_prefill_fails,
        mutants.a_new_rank_finds_the_old_records,
        mutants.nobody_is_told_who_was_replaced,
        mutants.what_is_known_is_told_again,
        mutants.a_lost_group_keeps_its_requests,
        mutants.blocks_are_free_while_they_are_read,
        mutants.what_failed_counts_as_computed,
        mutants.progress_is_journalled_twice,
    ],
    ids=lambda mutant: mutant.__name__,
)
def test_a_defect_is_seen(monkeypatch: pytest.MonkeyPatch, mutant: Callable[[pytest.MonkeyPatch], None]) -> None:
    mutant(monkeypatch)
    with pytest.raises(AssertionError, match="seed"):
        _ = [run(seed) for seed in range(NUM_SEEDS)]
