"""An engine on one GPU: the contract as far as one rank can break it, decode graphs, and steps that run ahead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from shoal.parallel.groups import single_process_groups
from shoal.parallel.request_id import RequestId
from shoal.runtime.engine.build import build_engine
from shoal.runtime.engine.config import EngineConfig
from shoal.runtime.random_checkpoint import make_checkpoint
from shoal.runtime.types import Request, SamplingParams
from tests.support.answers import Answers
from tests.support.invariance import (
    BASE_ENGINE,
    SCHEDULES,
    Point,
    differing,
    dtypes,
    make_model,
    rows,
    run_point,
    run_rows,
)

pytestmark = pytest.mark.gpu

MODELS = [
    ("deepseek_v3", "bfloat16"),
    ("deepseek_v32", "bfloat16"),
    ("deepseek_v32", "fp8"),
    ("glm_moe_dsa", "float32"),
]
WIDE = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 128}
"""What FP8 entries are made for."""
POINTS: dict[str, dict[str, Any]] = {
    **{name: how for name, how in SCHEDULES.items() if "threads" not in how},
    "without graphs": {"engine": {"enforce_eager": True}},
    "2 sequences at a time": {"engine": {"max_num_seqs": 2}},
    "longer tables": {"engine": {"max_model_len": 2560, "num_kv_blocks": 512}},
}


@pytest.mark.parametrize(("model_type", "dtype"), MODELS)
def test_the_answer_does_not_depend_on_how_it_is_computed(tmp_path: Path, model_type: str, dtype: str) -> None:
    model_dir = make_model(tmp_path, model_type, dtype)
    groups = single_process_groups(torch.device("cuda"))
    base = run_point(Point("reference"), model_dir, dtype, groups)
    assert len({row[0][1] for row in base.values()}) == len(base) == 7
    found = {
        name: differing(run_point(Point(name, **how), model_dir, dtype, groups), base) for name, how in POINTS.items()
    }
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize("model_type", ["deepseek_v3", "deepseek_v32"])
def test_a_cache_in_fp8(tmp_path: Path, model_type: str) -> None:
    wide = {name: value for name, value in WIDE.items() if model_type == "deepseek_v32" or name != "index_head_dim"}
    make_checkpoint(tmp_path, model_type, seed=11, dtype=torch.bfloat16, overrides=wide)
    groups = single_process_groups(torch.device("cuda"))
    base = run_point(Point("reference"), tmp_path, "bfloat16, fp8 cache", groups)
    assert differing(run_point(Point("reference"), tmp_path, "bfloat16", groups), base)
    some = ("one after another", "chunks of 7", "prefix cache warm", "too few blocks", "without graphs")
    found = {
        name: differing(run_point(Point(name, **POINTS[name]), tmp_path, "bfloat16, fp8 cache", groups), base)
        for name in some
    }
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


def test_an_fp8_cache_of_other_widths_is_refused(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path, "deepseek_v3", "bfloat16")
    with pytest.raises(ValueError, match="kv_cache_dtype fp8 on a GPU needs dtype bfloat16, kv_lora_rank 512"):
        build_engine(model_dir, EngineConfig(kv_cache_dtype="fp8"), single_process_groups(torch.device("cuda")))


def sampled_on_device(vocab_size: int) -> list[Request]:
    """Rows whose tokens the device chooses, so that steps run ahead; they end at different times."""
    kept = [r for r in rows(vocab_size) if r.index < 5]
    return [replace(r, params=replace(r.params, max_tokens=10 + 3 * r.index)) for r in kept]


def test_steps_that_run_ahead_change_nothing(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path, "deepseek_v32", "bfloat16")
    found, ahead = [], []
    for eager in (True, False):
        config = EngineConfig(**{**BASE_ENGINE, **dtypes("bfloat16"), "enforce_eager": eager})
        engine = build_engine(model_dir, config, single_process_groups(torch.device("cuda")))
        calls: list[int] = []
        run_ahead = engine.runner.run_ahead

        def counting(*args: Any, calls: list[int] = calls, run_ahead: Any = run_ahead) -> torch.Tensor:
            calls.append(1)
            logits: torch.Tensor = run_ahead(*args)
            return logits

        engine.runner.run_ahead = counting  # type: ignore[method-assign, assignment]
        found.append(run_rows(engine, Point("ahead"), sampled_on_device(engine.limits.vocab_size)))
        assert engine.audit() == []
        ahead.append(len(calls))
    assert differing(found[0], found[1]) == []
    assert ahead[0] == 0
    assert ahead[1] > 10


def test_a_request_that_is_aborted_while_its_step_runs(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path, "deepseek_v3", "bfloat16")
    config = EngineConfig(**{**BASE_ENGINE, **dtypes("bfloat16")})
    engine = build_engine(model_dir, config, single_process_groups(torch.device("cuda")))
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    collected = Answers()
    for attempt in range(2):
        for name in ("a", "b"):
            prompt = (5, 7, 9) if name == "a" else (11, 13)
            request_id = f"{name}{attempt}"
            request = Request(request_id=request_id, prompt_token_ids=prompt, params=params, index=0)
            collected.expect(request)
            engine.add_request(request)
        steps = 0
        while engine.has_unfinished:
            steps += 1
            if attempt and steps == 4:
                engine.abort(RequestId("b1"))
            collected.take(engine.step().outputs)
        assert engine.audit() == []
    answers = {name: output.outputs[0].token_ids for name, output in collected.finished.items()}
    assert answers["a0"] == answers["a1"]
    assert set(answers) == {"a0", "b0", "a1"}
