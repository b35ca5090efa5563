"""Every order of events of the hand-off, with every fault at every moment; see `search`."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
from msgspec.structs import replace

from shoal.runtime.types import GeneratedTokens, Request, SamplingParams
from tests.simulation import mutants

from .engine import EngineSettings
from .model import Row
from .search import FAULTS, Scope, Search

pytestmark = pytest.mark.slow

NUM_WALKS = int(os.environ.get("SHOAL_WALKS", "2000"))
MAX_FAULTS = int(os.environ.get("SHOAL_MAX_FAULTS", "2"))
"""Most faults in one request's hand-off; 3 take 20 s and 750 MB."""


@pytest.fixture(autouse=True)
def _without_garbage_collection() -> Iterator[None]:
    """A search holds a million small tuples, and no cycle; to look through them takes half of the time."""
    gc.disable()
    yield
    gc.enable()


def scope(
    *prompts: tuple[int, ...],
    max_faults: int,
    faults: tuple[str, ...] = FAULTS,
    num_generated: int = 0,
    prefill: dict[str, Any] | None = None,
    decode: dict[str, Any] | None = None,
    **params: Any,
) -> Scope:
    """Rows of three tokens each, prompts in chunks of two."""
    settings = SamplingParams(**{"max_tokens": 3, "seed": 4, "ignore_eos": True, **params})
    rows = {}
    for name, prompt in zip("ab", prompts, strict=False):
        request = Request(request_id=name, prompt_token_ids=prompt, params=settings)
        known = tuple(GeneratedTokens(tuple(a.output[:num_generated])) for a in Row(request).answers)
        rows[name] = Row(replace(request, generated=known if num_generated else ()))
    engine = {"num_blocks": 4, "block_size": 2, "max_num_batched_tokens": 2, "max_model_len": 8}
    engines = EngineSettings(**{**engine, **(prefill or {})}), EngineSettings(**{**engine, **(decode or {})})
    return Scope(rows=rows, settings=engines, faults=faults, max_faults=max_faults)


THREE_CHUNKS = (1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("searched", "num_states"),
    [
        (scope(THREE_CHUNKS, max_faults=MAX_FAULTS), 50_000),
        (scope(THREE_CHUNKS, max_faults=1, num_generated=2), 3_000),
        (scope(THREE_CHUNKS, max_faults=1, n=2), 5_000),
        (scope(THREE_CHUNKS, max_faults=1, prompt_logprobs=0), 3_000),
        (
            scope(THREE_CHUNKS, max_faults=1, prefill={"block_size": 3}, decode={"max_num_batched_tokens": 3}),
            3_000,
        ),
        (scope(THREE_CHUNKS, (1, 2, 6), max_faults=0), 300),
        (scope((1, 2, 3, 4), (1, 2, 3, 5), max_faults=1, max_tokens=2, decode={"num_blocks": 5}), 5_000),
        (
            scope((1, 2, 3), (1, 2, 4), max_faults=1, decode={"block_size": 1, "num_blocks": 6, "max_num_seqs": 2}),
            10_000,
        ),
    ],
    ids=[
        "all faults",
        "resumed",
        "two continuations",
        "logprobs of the prompt",
        "unequal blocks",
        "two requests, no fault",
        "two requests with the same beginning",
        "two requests and few blocks",
    ],
)
def test_every_order_of_events(searched: Scope, num_states: int) -> None:
    found = Search(searched).run()
    assert found.num_states > num_states, "it is not what was meant to be searched"
    assert found.num_ends >= 1


def test_many_ways_through_many_faults() -> None:
    search = Search(scope(THREE_CHUNKS, (1, 2, 6), max_faults=5))
    rng = Random(0)
    lengths = [search.walk(rng, fault_rate=0.1) for _ in range(NUM_WALKS)]
    assert max(lengths) > 30


@pytest.mark.parametrize(
    ("mutant", "searched"),
    [
        (mutants.records_are_not_checked, scope(THREE_CHUNKS, max_faults=1)),
        (mutants.a_preempted_load_goes_on, scope(THREE_CHUNKS, max_faults=1)),
        (mutants.records_count_before_they_are_written, scope(THREE_CHUNKS, max_faults=0)),
        (mutants.an_export_is_released_when_it_is_complete, scope(THREE_CHUNKS, max_faults=0)),
        (mutants.what_was_generated_is_forgotten_when_the_prefill_fails, scope(THREE_CHUNKS, max_faults=1)),
        (mutants.what_is_known_is_told_again, scope(THREE_CHUNKS, max_faults=1)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_defect_is_seen(
    monkeypatch: pytest.MonkeyPatch, mutant: Callable[[pytest.MonkeyPatch], None], searched: Scope
) -> None:
    mutant(monkeypatch)
    with pytest.raises(AssertionError, match="the way there"):
        Search(searched).run()
