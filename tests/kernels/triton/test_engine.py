"""An engine on the Triton kernels: the answers of the CPU kernels; on a GPU, the same bits alone and in company."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.parallel.groups import single_process_groups
from shoal.runtime.engine.build import build_engine
from shoal.runtime.engine.config import EngineConfig
from shoal.runtime.engine.engine import Engine
from shoal.runtime.random_checkpoint import make_checkpoint
from shoal.runtime.types import Request, RequestOutput, SamplingParams
from tests.kernels.triton.interpreter import DEVICE
from tests.support.answers import Answers
from tests.support.fakes.install import install

pytestmark = pytest.mark.slow

PROMPTS = [list(range(3, 14)), [7, 5]]


def make_engine(model: Path, **settings: Any) -> Engine:
    config = EngineConfig(**{"block_size": 4, "num_kv_blocks": 64, "max_model_len": 64, **settings})
    device = torch.device(DEVICE if config.kernel_backend == "triton" else "cpu")
    return build_engine(model, config, single_process_groups(device))


def add(engine: Engine, prompts: list[list[int]]) -> Answers:
    """Add a request per prompt; returns what takes their outputs."""
    collected = Answers()
    for i, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0.0, max_tokens=2, logprobs=0, ignore_eos=True)
        request = Request(request_id=str(i), index=i, prompt_token_ids=tuple(prompt), params=params)
        collected.expect(request)
        engine.add_request(request)
    return collected


def answers(model: Path, prompts: list[list[int]], **settings: Any) -> list[RequestOutput]:
    engine = make_engine(model, **settings)
    collected = add(engine, prompts)
    while engine.has_unfinished:
        collected.take(engine.step().outputs)
    return [collected.finished[str(i)] for i in range(len(prompts))]


def logprobs(output: RequestOutput) -> list[float]:
    completion = output.outputs[0]
    assert completion.logprobs is not None
    return [entry[token].logprob for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)]


@pytest.mark.parametrize("model_type", ["deepseek_v3", "deepseek_v32"])
def test_an_engine_gives_the_answers_of_the_cpu_kernels(tmp_path: Path, model_type: str) -> None:
    make_checkpoint(tmp_path, model_type, seed=5, dtype=torch.float32)
    expected = answers(tmp_path, PROMPTS, kernel_backend="cpu")
    together = answers(tmp_path, PROMPTS, kernel_backend="triton")
    for ours, cpu in zip(together, expected, strict=True):
        assert ours.outputs[0].token_ids == cpu.outputs[0].token_ids
        assert logprobs(ours) == pytest.approx(logprobs(cpu), abs=1e-4)
    if DEVICE == "cpu":
        return  # interpreted products are numpy's, whose sums depend on where in a tile a row is
    [alone] = answers(tmp_path, PROMPTS[:1], kernel_backend="triton", max_num_batched_tokens=7)
    assert alone.outputs[0].token_ids == together[0].outputs[0].token_ids
    assert logprobs(alone) == logprobs(together[0])


@pytest.mark.parametrize(
    ("vendor", "model_type", "settings"),
    [
        ("flash_mla", "deepseek_v32", {"kv_cache_dtype": "fp8"}),
        ("flash_mla", "deepseek_v3", {"block_size": 64}),
        ("deep_gemm", "deepseek_v32", {"kv_cache_dtype": "fp8", "block_size": 64}),
    ],
)
def test_an_engine_on_a_vendors_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vendor: str, model_type: str, settings: dict[str, Any]
) -> None:
    if DEVICE == "cpu":
        install(monkeypatch, vendor)
    elif find_spec(vendor) is None:
        pytest.skip(f"{vendor} is not installed")
    sizes = {"num_hidden_layers": 2, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "hidden_size": 128}
    sizes |= {"moe_intermediate_size": 128, "intermediate_size": 128}
    sizes |= {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    if model_type == "deepseek_v32":
        sizes |= {"index_head_dim": 128, "index_n_heads": 32, "index_topk": 2}
    fp8 = vendor == "deep_gemm"
    make_checkpoint(tmp_path, model_type, seed=5, dtype=torch.bfloat16, fp8=fp8, overrides=sizes)
    prompts = [PROMPTS[1]]
    expected = answers(tmp_path, prompts, kernel_backend="triton", **settings)
    got = answers(tmp_path, prompts, kernel_backend="triton", vendor_kernels=vendor, invariance="relaxed", **settings)
    assert logprobs(got[0]) == pytest.approx(logprobs(expected[0]), abs=0.05)


def test_vendors_kernels_promise_nothing_and_need_a_gpu(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v3", seed=5, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"flash_mla: its decode kernels split a context .* invariance to relaxed"):
        answers(tmp_path, PROMPTS, kernel_backend="triton", vendor_kernels="flash_mla")
    with pytest.raises(ValueError, match="of flash_mla, deep_gemm take the place of kernels 'triton', not of 'cpu'"):
        answers(tmp_path, PROMPTS, kernel_backend="cpu", vendor_kernels="all", invariance="relaxed")


@pytest.mark.skipif(find_spec("flash_mla") is not None, reason="FlashMLA is installed")
def test_a_missing_vendor_is_an_error_that_says_where_to_get_it(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v3", seed=5, dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"vendor_kernels flash_mla needs the module flash_mla, .* build it from https"
    ):
        answers(tmp_path, PROMPTS, kernel_backend="triton", vendor_kernels="flash_mla", invariance="relaxed")


def test_engines_on_all_backends_take_turns_in_one_process(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v3", seed=5, dtype=torch.float32)
    backends = ("reference", "auto", "triton")
    alone = {backend: answers(tmp_path, PROMPTS, kernel_backend=backend, invariance="relaxed") for backend in backends}
    engines = {backend: make_engine(tmp_path, kernel_backend=backend, invariance="relaxed") for backend in backends}
    collected = {backend: add(engine, PROMPTS) for backend, engine in engines.items()}
    while any(engine.has_unfinished for engine in engines.values()):
        for backend, engine in engines.items():
            collected[backend].take(engine.step().outputs)
    for backend in backends:
        for i, expected in enumerate(alone[backend]):
            assert collected[backend].finished[str(i)].outputs == expected.outputs
    assert logprobs(alone["auto"][0]) != logprobs(alone["reference"][0])
    assert logprobs(alone["auto"][0]) != logprobs(alone["triton"][0])
