"""An engine over the fake model, alone: what the whole clusters would show less clearly."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from msgspec.structs import replace

from shoal.runtime.types import Request, SamplingParams

from .engine import Alone, EngineSettings, SimulatedEngine, SingleRank
from .handoff_parts import Transport
from .model import Row

pytestmark = pytest.mark.slow


@dataclass
class TwoRanks(Alone):
    """A world in which the other rank has nothing to do."""

    size: int = 2

    def all_gather_ints(self, row: list[int], *, layer: int, op: str) -> list[list[int]]:
        return [row, [0] * len(row)]


def test_a_lease_ends_although_all_ranks_are_idle() -> None:
    request = Request(request_id="row", prompt_token_ids=(1, 2, 3), params=SamplingParams(seed=4, ignore_eos=True))
    groups, transport, settings = SingleRank(), Transport(), EngineSettings()
    groups.world = TwoRanks()
    engine = SimulatedEngine(settings, {"row": Row(request)}, groups, transport, transport.clock)
    engine.add_request(replace(request, do_remote_decode=True))
    steps = [engine.step() for _ in range(4)]
    assert [step.idle for step in steps] == [False, False, True, True]
    assert transport.published
    transport.now += settings.lease_s
    assert engine.step().idle
    engine.check_nothing_left()
