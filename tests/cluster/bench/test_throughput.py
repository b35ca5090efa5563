from __future__ import annotations

import hashlib
import json
import resource
import subprocess
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import shoal.cluster.bench.throughput
from shoal.cluster.bench.throughput import measure, results, step_phases, table
from shoal.cluster.bench.workload import Workload
from shoal.cluster.commands.cli import main
from shoal.cluster.engine_args import EngineArgs
from shoal.cluster.environment import peak_rss_mib
from shoal.cluster.llm import LLM
from shoal.runtime.engine.step_profile import PHASES, StepProfile
from shoal.runtime.random_checkpoint import make_checkpoint
from shoal.runtime.types import SamplingParams

SMALL: dict[str, Any] = {"max_model_len": 64, "num_kv_blocks": 8, "block_size": 16, "num_threads_per_worker": 1}
WORKLOAD = Workload(num_prompts=5, input_len=6, output_len=4, runs=2, seed=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("model")
    make_checkpoint(directory, "deepseek_v32")
    threads = torch.get_num_threads()
    yield str(directory)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def report(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Written by the command itself."""
    path = tmp_path_factory.mktemp("reports") / "new" / "report.json"
    flags = ["--num-prompts", "5", "--input-len", "6", "--output-len", "4", "--runs", "2", "--seed", "3"]
    engine = [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    result = CliRunner().invoke(main, ["bench", "throughput", "--model", model, "-o", str(path), *flags, *engine])
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(path.read_text())
    assert result.stdout == table(report) + "\n"
    assert "run 2 of 2" in result.stderr
    return report


def test_the_report_says_what_was_measured(report: dict[str, Any]) -> None:
    assert report["layout"] == {
        "executor": "inprocess",
        "num_workers": 1,
        "tensor_parallel_size": 1,
        "data_parallel_size": 1,
        "replicas": 1,
    }
    assert report["workload"] == {"num_prompts": 5, "input_len": 6, "output_len": 4, "runs": 2, "seed": 3}
    assert report["warmup"] == {"num_prompts": 2, "counted": False}
    assert report["engine"]["num_kv_blocks"] == 8
    assert (report["comparable"], "CPU" in report["comparable_reason"]) == (False, True)
    assert report["environment"]["versions"]["torch"] == torch.__version__
    assert report["environment"]["cores"] >= 1
    assert [phase["name"] for phase in report["startup"]["phases"]] == ["ready"]
    assert 0 < report["startup"]["phases"][0]["seconds"] <= report["startup"]["seconds"]
    figures = report["results"]
    assert (figures["num_input_tokens"], figures["num_output_tokens"]) == (30, 20)
    assert len(figures["seconds"]["runs"]) == len(report["output_digests"]) == 2
    assert report["peak_rss_mib"]["driver"] > 50


def test_equal_prompts_have_equal_digests_in_every_setting(model: str, report: dict[str, Any]) -> None:
    args = EngineArgs(model=model, max_num_seqs=1, enable_prefix_caching=False, **SMALL)
    again = measure(args, WORKLOAD, executor="auto", say=lambda text: None)
    assert again["output_digests"] == report["output_digests"]
    assert len(set(report["output_digests"])) == 2
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with LLM(model, **SMALL) as llm:
        prompts: list[Any] = WORKLOAD.prompts(320, "1")
        outputs = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    digest = hashlib.sha256(np.array(outputs, dtype="<u4").tobytes()).hexdigest()
    assert report["output_digests"][1] == f"sha256:{digest}"


def test_phases_of_a_step(model: str, report: dict[str, Any]) -> None:
    assert report["step_phases"] is None
    args = EngineArgs(model=model, **SMALL)
    again = measure(args, WORKLOAD, executor="auto", phases=True, say=lambda text: None)
    assert again["output_digests"] == report["output_digests"]
    phases = again["step_phases"]
    (rank,) = phases["ranks"]
    assert rank["num_steps"] == 2 * 4  # a prompt's last step gives the first of 4 tokens; the warm-up does not count
    assert sum(phases["share"].values()) == pytest.approx(1, abs=0.001)
    assert phases["seconds_per_step"] * 8 == pytest.approx(sum(rank["seconds"].values()), rel=0.1)
    assert phases["seconds_per_step"] * 8 <= sum(again["results"]["seconds"]["runs"])
    assert 0 <= phases["share_of_time_between_steps"] < 1
    assert f"attention {phases['share']['attention']:.1%}" in table(again)


def test_shares_of_phases() -> None:
    ranks = [
        StepProfile(2, dict.fromkeys(PHASES, 0.0) | {"attention": 3.0, "other": 1.0}),
        StepProfile(2, dict.fromkeys(PHASES, 0.0) | {"other": 4.0}),
    ]
    phases = step_phases(ranks, 5.0)
    assert phases is not None
    assert {phase: share for phase, share in phases["share"].items() if share} == {"attention": 0.375, "other": 0.625}
    assert (phases["share_of_time_between_steps"], phases["seconds_per_step"]) == (0.2, 2.0)


def test_prompts_are_random_ids_of_the_vocabulary() -> None:
    first, second = WORKLOAD.prompts(5, "0"), WORKLOAD.prompts(5, "1")
    assert first != second
    assert [len(prompt) for prompt in first] == [6] * 5
    assert {token for prompt in first + second for token in prompt} == {3, 4}


def test_rates() -> None:
    workload = Workload(num_prompts=2, input_len=6, output_len=2, runs=3)
    figures = results(workload, 2, [1.0, 4.0, 2.0])
    assert figures["seconds"] == {"median": 2.0, "min": 1.0, "max": 4.0, "runs": [1.0, 4.0, 2.0]}
    assert figures["input_tokens_per_s"] == {"median": 6.0, "min": 3.0, "max": 12.0, "runs": [12.0, 3.0, 6.0]}
    assert figures["output_tokens_per_s"]["runs"] == [4.0, 1.0, 2.0]
    assert figures["total_tokens_per_s"]["median"] == 8.0
    assert figures["output_tokens_per_s_per_worker"]["runs"] == [2.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-prompts", "0"], "num_prompts must be a whole number of at least 1, got 0"),
        (["--runs", "-1"], "runs must be"),
        (["--input-len", "2500", "--output-len", "61"], "is 2561, above the longest context of 2560 tokens"),
        (["--max-model-len", "64"], "is 320, above the longest context of 64 tokens"),
        (["-tp", "2", "--executor", "inprocess"], "the in-process executor runs one worker"),
        (["-tp", "3"], "tensor_parallel_size"),
        (["-o", "."], "is a directory"),
    ],
)
def test_bad_values_are_usage_errors(model: str, flags: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["bench", "throughput", "--model", model, *flags])
    assert (result.exit_code, message in result.stderr) == (2, True), result.output


def test_failed_engines_exit_5(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("rank 1: lost")

    monkeypatch.setattr(shoal.cluster.bench.throughput, "measure", fail)
    result = CliRunner().invoke(main, ["bench", "throughput", "--model", model])
    assert (result.exit_code, result.stderr) == (5, "error: the engines failed: rank 1: lost\n")


def test_peak_memory_counts_the_ray_workers_below_this_process() -> None:
    before = peak_rss_mib()
    assert abs(before["driver"] - resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024) <= 16
    names = ("ray::Worker.run", "ray::DashboardAgent", "sleep")
    children = [subprocess.Popen([name, "60"], executable="/bin/sleep") for name in names]
    try:
        assert len(peak_rss_mib()["workers"]) == len(before["workers"]) + 1
    finally:
        for child in children:
            child.kill()
            child.wait()
