from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from shoal.cluster.bench import kernels as bench_kernels
from shoal.cluster.bench.cases import cases
from shoal.cluster.bench.kernels import difference
from shoal.cluster.bench.shapes import SHAPES
from shoal.cluster.commands.cli import main
from shoal.kernels import registry


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(bench_kernels, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(bench_kernels, "MAX_COPIES", 2)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def bench(*flags: str) -> Any:
    return CliRunner().invoke(main, ["bench", "kernels", "--shapes", "tiny", *flags])


def test_every_op_is_measured_and_agrees_with_its_reference(tmp_path: Path) -> None:
    path = tmp_path / "new" / "kernels.json"
    result = bench("--refcheck", "--threads", "1", "-o", str(path))
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    assert report["threads"] == 1
    assert report["shapes"]["hidden_size"] == 96
    rows = report["kernels"]
    registered = {op for op, _ in registry._table} - {"pack_weight"}  # done once, when weights are loaded
    assert {row["op"] for row in rows} == registered | {"sample"}
    for row in rows:
        assert row["op"] in result.stdout
        assert row["seconds"] > 0
        least = row["fraction_of_peak"] * row["seconds"]
        binding = ("flops_per_s", "flops_per_s") if row["bound"] == "compute" else ("bytes_per_s", "bytes_per_s")
        assert least == pytest.approx(row[binding[0]] * row["seconds"] / report["peaks"][binding[1]])
        assert row.get("within_tolerance") is (None if row["op"] == "sample" else True)


def test_a_wrong_kernel_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    right = registry.find_kernel("swiglu", "cpu").run

    def wrong(gate_up: Tensor) -> Tensor:
        y: Tensor = right(gate_up)
        y[-1, -1] += 1
        return y

    monkeypatch.setitem(registry._table, ("swiglu", "cpu"), wrong)
    assert bench("--ops", "swiglu,rms_norm", "--refcheck").exit_code == 1
    assert bench("--ops", "swiglu").exit_code == 0  # not compared
    assert bench("--ops", "rms_norm", "--refcheck").exit_code == 0


def test_a_wrong_selection_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    right = registry.find_kernel("index_topk", "cpu").run

    def wrong(*args: Any) -> Tensor:
        selected: Tensor = right(*args)
        selected[0, 0] = 99 if selected[0, 0] != 99 else 98
        return selected

    monkeypatch.setitem(registry._table, ("index_topk", "cpu"), wrong)
    assert bench("--ops", "index_topk", "--refcheck").exit_code == 1


def test_bad_values_are_usage_errors() -> None:
    for flags, message in (
        (["--ops", "swigloo"], "there is no op 'swigloo'; there are add_rms_norm"),
        (["-o", "."], "is a directory"),
    ):
        result = bench(*flags)
        assert (result.exit_code, message in result.stderr) == (2, True), result.output


def test_costs_of_a_product() -> None:
    first = next(cases(SHAPES["v3-test"]))
    assert (first.op, first.sizes) == ("linear", "1 x 2048 -> 1024")
    assert (first.flops, first.num_bytes) == (2 * 2048 * 1024, 2 * (2048 * 1024 + 2048 + 1024))


def test_difference() -> None:
    reference = torch.tensor([[-4.0, 2.0]])
    assert difference(torch.tensor([[-4.0, 2.5]]), reference) == 0.125
    assert difference(reference.clone(), reference) == 0.0
    assert difference(torch.tensor([[math.nan, 2.0]]), reference) == math.inf
    assert difference(reference[:, :1], reference) == math.inf
    selected = torch.tensor([[1, 5, 7, -1]])
    assert difference(torch.tensor([[2, 5, 7, -1]]), selected) == 0.25
    assert difference(torch.tensor([[5, 1, 7, -1]]), selected) == 1.0
    assert difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == 1.0
