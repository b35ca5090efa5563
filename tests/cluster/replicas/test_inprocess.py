"""In-process engines share the process with a host program and with one another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from shoal.cluster.engine_args import EngineArgs
from shoal.cluster.replicas.inprocess import InProcessEngine
from shoal.runtime.random_checkpoint import make_checkpoint
from shoal.runtime.types import Request, RequestOutput, SamplingParams


def token_ids(engine: InProcessEngine) -> list[int]:
    engine.submit([Request(request_id="a", prompt_token_ids=(3, 4), params=SamplingParams(max_tokens=2, seed=1))])
    while True:
        for output in engine.poll(5.0):
            if isinstance(output, RequestOutput):
                return output.outputs[0].token_ids


def test_engines_leave_the_threads_of_the_host_program_as_they_are(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v3", seed=1, dtype=torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        args = EngineArgs(model=str(tmp_path), num_kv_blocks=16, max_model_len=32)
        first, second = (InProcessEngine(replace(args, num_threads_per_worker=n)) for n in (1, 2))
        assert torch.get_num_threads() == 3
        assert token_ids(first) == token_ids(second)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
