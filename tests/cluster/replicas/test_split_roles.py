"""Prefill and decode replicas of unequal layouts on a real local Ray: the answers of one process, bit for bit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from shoal import LLM, SamplingParams
from shoal.cluster.engine_args import EngineArgs
from shoal.cluster.routing.request_router import Effect, RequestRouter
from shoal.cluster.workers import kv_transports
from shoal.cluster.workers.kv_transports import choose_transport
from shoal.parallel.nixl_agent import is_installed
from shoal.runtime.random_checkpoint import make_checkpoint
from shoal.runtime.tokenization.byte_tokenizer import write_byte_tokenizer
from shoal.runtime.types import PromptLoaded, RequestOutput
from tests.support.invariance import bits, rows

needs_nixl = pytest.mark.skipif(not is_installed(), reason="nixl-cu13 is not installed")

SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "block_size": 8,
    "num_kv_blocks": 64,
    "max_model_len": 128,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    overrides = {"vocab_size": 272, "index_topk": 8, "num_attention_heads": 4, "num_key_value_heads": 4}
    make_checkpoint(path, "deepseek_v32", seed=5, overrides=overrides)
    write_byte_tokenizer(path / "tokenizer.json")
    return str(path)


def answers(model: str, **engine_args: Any) -> list[tuple[Any, ...]]:
    """Three times the rows of the invariance matrix, so that every replica has several at a time."""
    asked = [request for _ in range(3) for request in rows(272)]
    with LLM(model, **{**SETTINGS, **engine_args}) as llm:
        prompts = [{"prompt_token_ids": request.prompt_token_ids} for request in asked]
        outputs: list[RequestOutput] = llm.generate(prompts, [request.params for request in asked])
    return [bits(output) for output in outputs]


@pytest.fixture(scope="module")
def reference(model: str) -> list[tuple[Any, ...]]:
    return answers(model, executor="inprocess")


ONE_EACH = ["prefill:1", "decode:1"]
UNEQUAL = [
    {"role": "prefill", "count": 2, "tensor_parallel_size": 2},
    {"role": "decode", "count": 1, "data_parallel_size": 4},
]
WITH_A_MIXED_ONE = ["prefill:1:dp=2", "decode:1:tp=2", "mixed:1"]


@pytest.mark.ray
@pytest.mark.parametrize(
    ("replicas", "transport"),
    [
        pytest.param(ONE_EACH, "nixl", id="1 + 1, nixl", marks=needs_nixl),
        pytest.param(UNEQUAL, "nixl", id="2 x tp 2 -> dp 4, nixl", marks=needs_nixl),
        pytest.param(WITH_A_MIXED_ONE, "nixl", id="dp 2 -> tp 2 and a mixed one, nixl", marks=needs_nixl),
        pytest.param(WITH_A_MIXED_ONE, "ray", id="dp 2 -> tp 2 and a mixed one, ray"),
    ],
)
def test_the_answers_of_one_process(
    model: str,
    reference: list[tuple[Any, ...]],
    replicas: list[Any],
    transport: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[PromptLoaded] = []
    handle = RequestRouter._loaded

    def note(self: RequestRouter, tracked: Any, event: PromptLoaded) -> list[Effect]:
        loaded.append(event)
        return handle(self, tracked, event)

    monkeypatch.setattr(RequestRouter, "_loaded", note)
    assert answers(model, replicas=replicas, kv_transport=transport) == reference
    assert loaded
    assert [one.error for one in loaded if one.error is not None] == [], "prompts that were computed again"


@pytest.mark.ray
def test_streams_go_on_across_the_hand_over(model: str) -> None:
    import asyncio

    async def stream(**engine_args: Any) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
        with LLM(model, **{**SETTINGS, **engine_args}) as llm:
            return [list(o.outputs[0].token_ids) async for o in llm.stream([list(range(3, 30))], params)]

    split = asyncio.run(stream(replicas=["prefill:1", "decode:1"], kv_transport="ray"))
    whole = asyncio.run(stream(executor="inprocess"))
    assert split[-1] == whole[-1]
    assert len(split[-1]) == 6
    assert all(later[: len(earlier)] == earlier for earlier, later in itertools.pairwise(split))


def test_auto_takes_nixl_on_one_node_where_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    auto, nixl, ray = (EngineArgs(model="m", kv_transport=name) for name in ("auto", "nixl", "ray"))
    monkeypatch.setattr(kv_transports, "is_installed", lambda: True)
    monkeypatch.setattr(kv_transports, "trial_failure", lambda: None)
    assert [choose_transport(args, 1).name for args in (auto, nixl, ray)] == ["nixl", "nixl", "ray"]
    assert [choose_transport(args, 2).name for args in (auto, nixl, ray)] == ["ray", "nixl", "ray"]
    monkeypatch.setattr(kv_transports, "is_installed", lambda: False)
    assert [choose_transport(args, 1).name for args in (auto, ray)] == ["ray", "ray"]
    with pytest.raises(ValueError, match=r"needs the package nixl-cu13; .*pip install 'shoal\[nixl\]'"):
        choose_transport(nixl, 1)


def test_auto_says_why_it_passes_over_a_nixl_that_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    auto, nixl = (EngineArgs(model="m", kv_transport=name) for name in ("auto", "nixl"))
    monkeypatch.setattr(kv_transports, "is_installed", lambda: True)
    reason = "NIXL does not work on this node: it was killed by SIGSEGV when it was tried"
    monkeypatch.setattr(kv_transports, "trial_failure", lambda: reason)
    assert str(choose_transport(auto, 1)) == f"KV cache entries travel through ray ({reason})"
    with pytest.raises(ValueError, match=r"kv_transport nixl: NIXL does not work on this node: .* set kv_transport to"):
        choose_transport(nixl, 1)
