"""How a set of replicas starts, answers and ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ray

from shoal.cluster.engine_args import EngineArgs, read_model_config
from shoal.cluster.replicas import start as start_module
from shoal.cluster.replicas.start import start_engines
from shoal.cluster.workers.ray_cluster import LayoutDoesNotFit, Node
from shoal.cluster.workers.spec import Phase
from shoal.runtime.types import Request, RequestOutput, SamplingParams
from tests.support.checkpoints import tiny_config
from tests.support.stub_engine import STUB


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


def test_weights_are_counted_in_the_computing_dtype(tmp_path: Path) -> None:
    model = write_config(tmp_path, torch_dtype="bfloat16")
    (tmp_path / "a.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "b.safetensors").write_bytes(b"x" * 20)
    config = read_model_config(EngineArgs(model=model))
    assert start_module._weight_bytes(EngineArgs(model=model), config) == 120
    assert start_module._weight_bytes(EngineArgs(model=model, dtype="float32"), config) == 240


def test_replicas_start_answer_and_end_with_their_ray(tmp_path: Path) -> None:
    phases: list[Phase] = []
    args = EngineArgs(model=write_config(tmp_path), replicas=2, max_num_seqs=4)
    router = start_engines(args, on_phase=phases.append, engine_factory=STUB)
    try:
        assert [phase.name for phase in phases] == ["ray", "placement", "workers", "groups", "stub", "ready"]
        assert str(phases[4]) == "stub 0.2 s"
        assert phases[5].detail == "this is a stub"
        router.submit([request("a", 2, 3), request("b", 3, 2)])
        outputs: dict[str, list[int]] = {}
        while router.num_in_flight:
            answers = [output for output in router.poll(60.0) if isinstance(output, RequestOutput)]
            outputs |= {answer.request_id: answer.outputs[0].token_ids for answer in answers}
        assert outputs == {"a": [2, 3, 4], "b": [3, 4]}
    finally:
        router.close()
    assert not ray.is_initialized()
    router.close()


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
