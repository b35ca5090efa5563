"""What `bench throughput --phases` measures on a GPU: the time of the device, which the host does not see."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from shoal.parallel.groups import single_process_groups
from shoal.runtime.engine.build import build_engine
from shoal.runtime.engine.config import EngineConfig
from shoal.runtime.engine.step_profile import add_phase_timer, profile_of
from shoal.runtime.types import Request, SamplingParams
from tests.support.invariance import make_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_phases_are_times_of_the_device(tmp_path: Path, enforce_eager: bool) -> None:
    model_dir = make_model(tmp_path, "deepseek_v32", "bfloat16")
    groups = single_process_groups(torch.device("cuda"))
    add_phase_timer(groups.spans, groups.device)
    engine = build_engine(model_dir, EngineConfig(enforce_eager=enforce_eager, max_model_len=256), groups)
    params = SamplingParams(max_tokens=64, ignore_eos=True, temperature=1.0, seed=1)
    for attempt in range(2):  # the first one compiles and captures
        before = profile_of(groups.spans)
        engine.add_request(Request(request_id=str(attempt), prompt_token_ids=tuple(range(3, 20)), params=params))
        torch.cuda.synchronize()
        begin = time.perf_counter()
        num_steps = 0
        while engine.has_unfinished:
            engine.step()
            num_steps += 1
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    engine.step()  # which reads what the device had not done by the end of the last step
    profile = profile_of(groups.spans).since(before)
    assert profile.num_steps == num_steps
    assert 0 < sum(profile.seconds.values()) <= seconds
    layers = profile.seconds["attention"] + profile.seconds["experts"]
    if enforce_eager:
        assert layers > profile.seconds["model"], "the rest of the model is two norms and the embedding"
    else:
        assert profile.seconds["model"] > layers, "of 64 steps all but the first are graphs"
