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
DTYPES = {
    "deepseek_v3": ["float32", "bfloat16"],
    "deepseek_v32": ["float32", "bfloat16", "fp8", "bfloat16, fp8 cache"],
    "glm_moe_dsa": ["float32", "bfloat16", "float32, fp8 cache"],
    NO_QUERY_LATENT: ["float32", "bfloat16"],
    "glm4_moe_lite": ["float32", "bfloat16"],
}
REPLICAS = {"1 worker": 1, "2 replicas": 2}
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

same: all bits equal.
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
@pytest.mark.parametrize("model_type", DTYPES)
def test_the_answer_does_not_depend_on_how_it_is_computed(tmp_path: Path, model_type: str) -> None:
    wrong: dict[str, list[int]] = {}
    expected: list[Rows] = []
    models = [(make_model(tmp_path, model_type, dtype), dtype) for dtype in DTYPES[model_type]]
    for model_dir, dtype in models:
        base = reference(model_dir, dtype)
        expected.append(base)
        for layout, replicas in REPLICAS.items():
            for name, how in SCHEDULES.items():
                rows = run_point(Point(name, replicas=replicas, **how), model_dir, dtype, single_process_groups())
                wrong[f"{dtype}: {layout}, {name}"] = differing(rows, base)

    points = [
        Point(f"{layout}, {name}", **LAYOUTS[layout], **how)
        for layout in LAYOUTS
        for name, how in SCHEDULES_ON_RANKS.items()
    ]
    per_rank = run_ranks(run_points_on_rank, 4, models, points, timeout_s=900.0)
    for index, (_, dtype) in enumerate(models):
        for number, point in enumerate(points):
            rows = {row: value for rank in per_rank for row, value in rank[index][number].items()}
            wrong[f"{dtype}: {point.name}"] = differing(rows, expected[index])

    assert len(wrong) == len(models) * (len(REPLICAS) * len(SCHEDULES) + len(points))
    assert {name: rows for name, rows in wrong.items() if rows} == {}, "rows that differ"


@pytest.mark.docs
def test_the_document_lists_what_is_compared() -> None:
    write_or_compare(DOCUMENT, document())


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


def document() -> str:
    """The table in docs/. Each of its cells is asserted above."""
    columns = [f"{model_type} {dtype}" for model_type, dtypes in DTYPES.items() for dtype in dtypes]
    rows = [(layout, name) for layout in REPLICAS for name in SCHEDULES]
    rows += [(layout, name) for layout in LAYOUTS for name in SCHEDULES_ON_RANKS]
    lines = [HEAD, "| layout | schedule and cache | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    lines += [f"| {layout} | {name} |" + " same |" * len(columns) for layout, name in rows]
    return "\n".join([*lines, TAIL])
