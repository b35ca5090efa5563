"""An engine on the Triton kernels: the answers of the CPU kernels; on a GPU, the same bits alone and in company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.kernels.registry import use_backend
from shoal.parallel.groups import single_process_groups
from shoal.runtime.engine import Engine
from shoal.runtime.engine_config import EngineConfig
from shoal.runtime.model_loading import choose_backend
from shoal.runtime.types import Request, RequestOutput, SamplingParams
from tests.checkpoints import make_checkpoint
from tests.kernels.triton.interpreter import DEVICE

PROMPTS = [list(range(3, 14)), [7, 5]]


def answers(model: Path, prompts: list[list[int]], **settings: Any) -> list[RequestOutput]:
    config = EngineConfig(block_size=4, num_kv_blocks=64, max_model_len=64, **settings)
    backend = settings["kernel_backend"]
    with use_backend(backend):  # as the engine chooses it for the whole process
        device = torch.device(DEVICE if backend == "triton" else "cpu")
        engine = Engine(model, config, single_process_groups(device))
        for i, prompt in enumerate(prompts):
            params = SamplingParams(temperature=0.0, max_tokens=2, logprobs=0, ignore_eos=True)
            engine.add_request(Request(request_id=str(i), index=i, prompt_token_ids=tuple(prompt), params=params))
        finished: dict[str, RequestOutput] = {}
        while engine.has_unfinished:
            finished |= {o.request_id: o for o in engine.step().outputs if o.finished}
    return [finished[str(i)] for i in range(len(prompts))]


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


def test_kernels_follow_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert choose_backend("auto", cpu) is None
    assert choose_backend("auto", gpu) == "triton"
    assert choose_backend("reference", gpu) == "reference"
    with pytest.raises(ValueError, match='kernels "cpu" do not run on a GPU'):
        choose_backend("cpu", gpu)
    with pytest.raises(ValueError, match='kernels "triton" need device "cuda"'):
        choose_backend("triton", cpu)
