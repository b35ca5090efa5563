"""The contract, compared bit for bit: tokens and log-probabilities of the same rows in every way of running them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shoal.parallel.groups import single_process_groups
from shoal.runtime.checkpoint.checkpoint import Checkpoint
from shoal.runtime.checkpoint.fp8_blocks import SCALE_SUFFIX
from shoal.runtime.engine.build import build_engine
from shoal.runtime.engine.config import EngineConfig
from shoal.runtime.engine.model_loading import check_layout
from shoal.runtime.models.families import read_config
from tests.support.invariance import (
    NO_QUERY_LATENT,
    SCHEDULES,
    Point,
    Rows,
    differing,
    make_model,
    run_point,
    run_points_on_rank,
)
from tests.support.spawn import run_ranks
from tests.support.tables import write_or_compare

pytestmark = pytest.mark.slow

DOCUMENT = Path(__file__).parents[2] / "docs" / "invariance.md"
MODELS = [(m, d) for m in ("deepseek_v3", "deepseek_v32", "glm_moe_dsa") for d in ("float32", "bfloat16")]
MODELS += [("deepseek_v32", "fp8"), ("deepseek_v32", "bfloat16, fp8 cache"), ("glm_moe_dsa", "float32, fp8 cache")]
MODELS += [(m, d) for m in (NO_QUERY_LATENT, "glm4_moe_lite") for d in ("float32", "bfloat16")]

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp 2": {"tp": 2},
    "tp 4": {"tp": 4},
    "dp 2": {"dp": 2},
    "dp 4": {"dp": 4},
    "tp 2 x dp 2": {"tp": 2, "dp": 2},
}
SCHEDULES_ON_RANKS: dict[str, dict[str, Any]] = {
    "all together": {},
    "chunks of 7, preempted, reversed": {"engine": {"max_chunk_size": 7}, "preempt_every": 3, "order": "reversed"},
    "budget of 5 tokens, prefix cache off": {
        "engine": {"max_num_batched_tokens": 5, "enable_prefix_caching": False, "num_kv_blocks": 24},
    },
    "resumed after 9 steps, chunks of 7": {"engine": {"max_chunk_size": 7}, "resume_after": 9},
    "prefix cache warm, blocks of 4": {"engine": {"block_size": 4, "num_kv_blocks": 128}, "warm": True},
}

HEAD = """# What gives the same bits

`tests/contract/test_invariance_matrix.py` runs the same seven rows (prompts of 1 to 70 tokens; greedy and seeded
sampling, penalties, `n = 2`, log-probabilities of outputs and of a prompt) in each of these ways and compares every
token id and every log-probability with those of one worker with one thread. fp8: weights in FP8, computed in bfloat16.
`make docs` writes this table.

same: all bits equal. -: not run with this model.
"""
TAIL = """
Refused, with the reason, when the engine is configured:

| combination | reason |
|---|---|
| `tensor_parallel_size` that does not divide heads, hidden, intermediate and vocabulary sizes | outputs split evenly |
| torch reference kernels with `invariance: strict` | torch's products depend on the batch |
"""


def reference(model_dir: Path, dtype: str) -> Rows:
    """One rank, one thread, everything together."""
    rows = run_point(Point("reference"), model_dir, dtype, single_process_groups())
    assert len(rows) == 7
    return rows


@pytest.mark.docs
def test_the_answer_does_not_depend_on_how_it_is_computed(tmp_path: Path) -> None:
    cells: dict[tuple[str, str], dict[str, list[int]]] = {}
    expected: dict[tuple[str, str], Rows] = {}
    for model_type, dtype in MODELS:
        model_dir = make_model(tmp_path, model_type, dtype)
        expected[model_type, dtype] = base = reference(model_dir, dtype)
        for layout, replicas in {"1 worker": 1, "2 replicas": 2}.items():
            for name, how in SCHEDULES.items():
                point = Point(name, replicas=replicas, **how)
                rows = run_point(point, model_dir, dtype, single_process_groups())
                cells.setdefault((layout, name), {})[f"{model_type} {dtype}"] = differing(rows, base)

    models = [(tmp_path / f"{m}-{d}", d) for m, d in MODELS]
    names = [(layout, schedule) for layout in LAYOUTS for schedule in SCHEDULES_ON_RANKS]
    points = [Point(f"{a}, {b}", **LAYOUTS[a], **SCHEDULES_ON_RANKS[b]) for a, b in names]
    per_rank = run_ranks(run_points_on_rank, 4, models, points, timeout_s=900.0)
    for index, model in enumerate(MODELS):
        for number, cell in enumerate(names):
            rows = {row: value for rank in per_rank for row, value in rank[index][number].items()}
            cells.setdefault(cell, {})[" ".join(model)] = differing(rows, expected[model])

    wrong = {name: {m: r for m, r in models.items() if r} for name, models in cells.items()}
    assert {name: models for name, models in wrong.items() if models} == {}, "rows that differ"
    write_or_compare(DOCUMENT, document(cells))


def test_the_rows_differ_from_each_other_and_between_models(tmp_path: Path) -> None:
    """A comparison that could not fail would prove nothing."""
    first = reference(make_model(tmp_path, "deepseek_v32", "float32"), "float32")
    model_dir = make_model(tmp_path, "deepseek_v32", "bfloat16")
    second, third = reference(model_dir, "bfloat16"), reference(model_dir, "bfloat16, fp8 cache")
    assert len({row[0][1] for row in first.values()}) == len(first)
    assert differing(first, second)
    assert differing(second, third)


def test_weights_in_fp8_answer_like_the_dequantised_ones(tmp_path: Path) -> None:
    path = make_model(tmp_path, "deepseek_v32", "fp8")
    expected = reference(path, "fp8")
    with Checkpoint(path) as checkpoint:
        names = [name for name in checkpoint.names if not name.endswith(SCALE_SUFFIX)]
        assert any(checkpoint.dtype(name) is torch.float8_e4m3fn for name in names)
        tensors = {
            name: checkpoint.read(name, dtype=None if checkpoint.dtype(name) is torch.float32 else torch.bfloat16)
            for name in names
        }
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    assert differing(reference(path, "bfloat16"), expected) == []


def test_what_cannot_keep_the_contract_is_refused(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path, "deepseek_v3", "float32")
    with pytest.raises(ValueError, match=r"num_attention_heads = 4 cannot be split over tensor_parallel_size = 3"):
        check_layout(read_config(model_dir), 3)
    with pytest.raises(ValueError, match="set invariance to relaxed"):
        build_engine(model_dir, EngineConfig(kernel_backend="reference"), single_process_groups())


def document(cells: dict[tuple[str, str], dict[str, list[int]]]) -> str:
    """The table in docs/."""
    columns = [f"{m} {d}" for m, d in MODELS]
    lines = [HEAD, "| layout | schedule and cache | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    for (layout, schedule), models in cells.items():
        row = ["same" if models.get(c) == [] else "-" for c in columns]
        lines.append(f"| {layout} | {schedule} | " + " | ".join(row) + " |")
    return "\n".join([*lines, TAIL])
