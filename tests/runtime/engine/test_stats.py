"""The counters of an engine, on the fake model of the simulation."""

from __future__ import annotations

from msgspec.structs import replace

from shoal.parallel.request_id import RequestId
from shoal.runtime.engine.stats import EngineStats
from shoal.runtime.types import Request, SamplingParams
from tests.simulation.engine import EngineSettings, SimulatedEngine, SingleRank
from tests.simulation.handoff_parts import Transport
from tests.simulation.model import Row


def test_counters_of_an_engine() -> None:
    params = SamplingParams(seed=4, max_tokens=2, ignore_eos=True)
    first = Request(request_id="a", prompt_token_ids=(1, 2, 3, 4, 5), params=params)
    second = replace(first, request_id="b", prompt_token_ids=(1, 2, 3, 4, 6))
    waits = replace(first, request_id="c", prompt_token_ids=(7, 8, 9))
    rows = {r.request_id: Row(r) for r in (first, second, waits)}
    transport = Transport()
    settings = EngineSettings(num_blocks=4, block_size=2, max_num_seqs=1)
    engine = SimulatedEngine(settings, rows, SingleRank(), transport, transport.clock)
    nothing = EngineStats(
        num_running_seqs=0,
        num_waiting_seqs=0,
        num_blocks=4,
        num_used_blocks=0,
        num_cached_blocks=0,
        num_evicted_blocks=0,
        num_preemptions=0,
        prefix_cache_queries=0,
        prefix_cache_hits=0,
        num_transfer_tokens=0,
        num_failed_transfers=0,
        num_transferred_bytes=0,
    )
    assert engine.stats() == nothing
    engine.add_request(first)
    engine.add_request(second)
    engine.step()
    running = replace(nothing, num_running_seqs=1, num_waiting_seqs=1, num_used_blocks=3, num_cached_blocks=2)
    assert engine.stats() == replace(running, prefix_cache_queries=5)
    while engine.has_unfinished:
        engine.step()
    # 5 tokens and one that was generated fill three blocks; the second prompt finds two of them, and adds its own
    after = replace(nothing, num_cached_blocks=4, prefix_cache_queries=10, prefix_cache_hits=4)
    assert engine.stats() == after
    engine.add_request(replace(waits, do_remote_prefill=True))
    engine.end_prefill(RequestId("c"), None)
    while engine.has_unfinished:
        engine.step()
    # 3 tokens take two blocks, which the prefix cache loses; both are full with the token that was generated
    assert engine.stats() == replace(after, prefix_cache_queries=13, num_evicted_blocks=2, num_failed_transfers=1)
