"""The contract across replicas: prompts that one replica computes and another goes on with give the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.parallel.groups import single_process_groups
from shoal.runtime.models.families import read_config
from shoal.runtime.types import Request
from tests.support.invariance import Point, make_model, rows, run_point
from tests.support.roles import Roles, run_roles
from tests.support.tables import write_or_compare

pytestmark = pytest.mark.slow

DOCUMENT = Path(__file__).parents[2] / "docs" / "invariance-roles.md"
MODELS = [(m, d) for m in ("deepseek_v3", "deepseek_v32", "glm_moe_dsa") for d in ("float32", "bfloat16")]
MODELS += [("deepseek_v32", "bfloat16, fp8 cache")]

POINTS: dict[str, Roles] = {
    "1 prefill, 1 decode": Roles(("prefill:1", "decode:1")),
    "2 prefill, 1 decode": Roles(("prefill:2", "decode:1")),
    "1 prefill, 2 decode": Roles(("prefill:1", "decode:2")),
    "2 prefill, 2 decode": Roles(("prefill:2", "decode:2")),
    "prefill tp 2, decode dp 4": Roles(("prefill:1:tp=2", "decode:1:dp=4")),
    "prefill dp 2, decode tp 2, and a mixed one": Roles(("prefill:1:dp=2", "decode:1:tp=2", "mixed:1")),
    "small steps and buffers": Roles(
        ("prefill:1", "decode:1"), engine={"max_num_batched_tokens": 7, "kv_buffer_size": 1, "num_kv_blocks": 24}
    ),
    "1 prefill, 1 decode, through NIXL": Roles(("prefill:1", "decode:1"), transport="nixl"),
    "prefill tp 2, decode dp 2, through NIXL": Roles(("prefill:1:tp=2", "decode:1:dp=2"), transport="nixl"),
    "KV cache entries arrive damaged: prompts computed again": Roles(("prefill:1", "decode:1"), transport="spoiled"),
}

HEAD = """# What gives the same bits across replicas

`tests/contract/test_invariance_roles.py` runs the rows of [invariance.md](invariance.md) through replicas of several
roles and compares every token id and every log-probability with those of one worker. Each rank is a real worker on a
thread; requests, KV cache entries and answers take the ways of a cluster.
`tests/cluster/replicas/test_split_roles.py` does the same with worker processes on Ray, through NIXL and through Ray's
object store. `make docs` writes this table.

"""


@pytest.mark.docs
def test_the_answer_does_not_depend_on_who_computes_the_prompt(tmp_path: Path) -> None:
    lines = ["| replicas | " + " | ".join(" ".join(m) for m in MODELS) + " |", "|---|" + "---|" * len(MODELS)]
    cells: dict[str, list[str]] = {name: [] for name in POINTS}
    wrong: dict[tuple[str, str], list[int]] = {}
    for model_type, dtype in MODELS:
        model_dir = make_model(tmp_path, model_type, dtype)
        expected = run_point(Point("reference"), model_dir, dtype, single_process_groups())
        for name, point in POINTS.items():
            found = run_roles(point, model_dir, dtype, asked(model_dir))
            differing = [i for i in expected if found[i] != expected[i]]
            wrong |= {(name, f"{model_type} {dtype}"): differing} if differing else {}
            cells[name].append("same")
    assert wrong == {}, "rows that differ"
    lines += [f"| {name} | " + " | ".join(row) + " |" for name, row in cells.items()]
    write_or_compare(DOCUMENT, HEAD + "\n".join(lines) + "\n")


def asked(model_dir: Path) -> list[Request]:
    return rows(read_config(model_dir).vocab_size)
