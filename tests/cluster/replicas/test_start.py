"""How a set of replicas starts, answers and ends."""

from __future__ import annotations

import json
import logging
import queue
import re
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from shoal.cluster.engine_args import EngineArgs, read_model_config
from shoal.cluster.replicas import start as start_module
from shoal.cluster.replicas.replica_pool import ReplicaPool
from shoal.cluster.replicas.start import announced, start_engines
from shoal.cluster.workers.ray_cluster import LayoutDoesNotFit, Node
from shoal.cluster.workers.spec import Phase
from shoal.runtime.random_checkpoint import tiny_config
from shoal.runtime.types import Request, RequestOutput, SamplingParams
from tests.support.stub_engine import RAISES, REFUSED, STUB


def request(request_id: str, num_prompt: int, max_tokens: int | None, n: int = 1) -> Request:
    params = SamplingParams(max_tokens=max_tokens, n=n)
    return Request(request_id=request_id, prompt_token_ids=(1,) * num_prompt, params=params)


def write_config(path: Path, **overrides: Any) -> str:
    (path / "config.json").write_text(json.dumps(tiny_config("deepseek_v3", overrides)))
    return str(path)


def test_a_layout_that_cannot_split_the_model_is_refused(tmp_path: Path) -> None:
    model = write_config(tmp_path)
    assert read_model_config(EngineArgs(model=model, tensor_parallel_size=4)).num_attention_heads == 4
    with pytest.raises(ValueError, match=r"num_attention_heads = 4 .*tensor_parallel_size = 3"):
        read_model_config(EngineArgs(model=model, tensor_parallel_size=3))
    assert read_model_config(EngineArgs(model=model, data_parallel_size=3)).hidden_size == 96


def test_a_context_longer_than_the_models_is_refused(tmp_path: Path) -> None:
    model = write_config(tmp_path, max_position_embeddings=100)
    assert read_model_config(EngineArgs(model=model, max_model_len=100)).max_position_embeddings == 100
    with pytest.raises(ValueError, match=r"max_model_len 101 is above .*100"):
        read_model_config(EngineArgs(model=model, max_model_len=101))


def test_a_bad_model_is_refused_before_ray_starts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        start_engines(EngineArgs(model=str(tmp_path)), engine_factory=STUB)
    assert not ray.is_initialized()


@pytest.mark.ray
def test_replicas_start_answer_and_end_with_their_ray(tmp_path: Path) -> None:
    phases: list[Phase] = []
    args = EngineArgs(model=write_config(tmp_path), replicas=2, max_num_seqs=4)
    pool = start_engines(args, on_phase=phases.append, engine_factory=STUB)
    try:
        assert [phase.name for phase in phases] == ["ray", "placement", "workers", "groups", "stub", "ready"]
        assert str(phases[4]) == "stub 0.2 s"
        assert phases[5].detail == "this is a stub"
        pool.submit([request("a", 2, 3), request("b", 3, 2)])
        outputs: dict[str, RequestOutput] = {}
        while pool.num_in_flight:
            outputs |= finished(pool)
        assert {request_id: output.outputs[0].token_ids for request_id, output in outputs.items()} == {
            "a": [2, 3, 4],
            "b": [3, 4],
        }
    finally:
        pool.close()
    assert not ray.is_initialized()
    pool.close()


@pytest.mark.ray
def test_warnings_of_a_worker_reach_the_log_of_the_driver(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pool = start_engines(EngineArgs(model=write_config(tmp_path), replicas=2), engine_factory=STUB)
    try:
        pool.submit([Request(request_id="a", prompt_token_ids=(REFUSED,), params=SamplingParams(max_tokens=3))])
        assert finished(pool)["a"].outputs[0].error == "refused by the stub"
        deadline = time.monotonic() + 600.0
        while not caplog.messages:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        pool.supervisor.check()
    finally:
        pool.close()
    assert caplog.record_tuples == [
        ("shoal.stub", logging.WARNING, "[mixed:0, rank 0, epoch 0] request a is refused"),
    ]


def finished(pool: ReplicaPool) -> dict[str, RequestOutput]:
    """The requests that the next poll finishes."""
    return {output.request_id: output for output in pool.poll(600.0) if isinstance(output, RequestOutput)}


@pytest.mark.ray
def test_a_request_that_ends_its_worker_is_given_up_and_the_others_are_answered(tmp_path: Path) -> None:
    args = EngineArgs(model=write_config(tmp_path), max_num_seqs=4, spares=1)
    pool = start_engines(args, engine_factory=STUB)
    try:
        bad = Request(request_id="bad", prompt_token_ids=(RAISES, 1), params=SamplingParams(max_tokens=3))
        pool.submit([request("a", 2, 3), bad, *(request(f"{number}", 3, 2) for number in range(6))])
        answers: dict[str, RequestOutput] = {}
        losses: dict[str, int] = {}
        counts: list[int] = []
        while pool.num_in_flight:
            answers |= finished(pool)
            losses |= pool.take_losses()
            counts.append(pool.stats()["mixed:0"].num_preemptions)
        assert answers.pop("a").outputs[0].token_ids == [2, 3, 4]
        error = answers.pop("bad").outputs[0].error or ""
        assert re.fullmatch(
            r"its worker was lost [45] times while it was answered, at last with no other request: "
            r"its loop failed: RuntimeError: the stub broke",
            error,
        )
        assert [output.outputs[0].token_ids for output in answers.values()] == [[3, 4]] * 6
        assert losses["bad"] in (4, 5)
        assert counts == sorted(counts), "what lost workers counted is kept"
        deadline = time.monotonic() + 600.0
        while pool.stats()["mixed:0"].num_preemptions <= counts[-1]:
            assert time.monotonic() < deadline, "the replacement does not count"
            time.sleep(0.05)
        assert list(pool.stats()) == ["mixed:0"]
        pool.submit([request("after", 2, 3)])
        while not (after := finished(pool)):
            pass
        assert after["after"].outputs[0].token_ids == [2, 3, 4]
    finally:
        pool.close()


@pytest.mark.ray
def test_a_cluster_that_is_too_small_is_refused_and_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []

    class Small:
        embedded = False

        def close(self) -> None:
            closed.append(True)

    two = Node(node_id="a", address="", num_cpus=2, num_gpus=0, memory_bytes=1 << 40, gpu_memory_bytes=None)
    monkeypatch.setattr(start_module, "connect", lambda *_, **__: Small())
    monkeypatch.setattr(start_module, "nodes", lambda: [two])
    with pytest.raises(LayoutDoesNotFit, match=r"needs 4 workers .*\(2 CPUs missing\)"):
        start_engines(EngineArgs(model=write_config(tmp_path), data_parallel_size=4), engine_factory=STUB)
    assert closed == [True]


def test_a_long_wait_says_what_it_waits_for() -> None:
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    with announced("room for 2 workers", said.put, after_s=0.0):
        assert said.get(timeout=600) == "waiting for room for 2 workers"


def test_a_short_wait_says_nothing() -> None:
    said: list[str] = []
    with announced("room for 2 workers", said.append, after_s=60.0):
        pass
    assert said == []
