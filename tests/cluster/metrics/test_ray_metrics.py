"""Metrics through Ray, of `LLM` and of a batch job whose engines run on it."""

from __future__ import annotations

import io
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal import LLM, SamplingParams
from shoal.cluster.bundled import BUNDLED_MODEL
from shoal.cluster.commands.batch import batch
from shoal.cluster.engine_args import EngineArgs
from shoal.cluster.jobs.config import JobConfig
from shoal.cluster.metrics import ray_metrics
from shoal.cluster.metrics.catalog import METRICS
from shoal.cluster.metrics.instruments import Labels
from shoal.cluster.metrics.ray_metrics import RayInstruments
from shoal.cluster.workers.ray_cluster import connect

pytestmark = [pytest.mark.ray, pytest.mark.slow]
MODEL_NAME = BUNDLED_MODEL.name


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    cluster = connect(None, num_cpus=2)
    yield
    cluster.close()


class Recorder(RayInstruments):
    """Ray's metrics, with the sum of what each was given."""

    told: dict[tuple[str, Labels], float]
    prefix: str

    def __init__(self, prefix: str) -> None:
        super().__init__(prefix)
        Recorder.told = {}
        Recorder.prefix = prefix

    def add(self, name: str, labels: Labels, amount: float) -> None:
        super().add(name, labels, amount)
        self.told[name, labels] = self.told.get((name, labels), 0.0) + amount

    def observe(self, name: str, labels: Labels, value: float) -> None:
        super().observe(name, labels, value)
        self.told[name, labels] = self.told.get((name, labels), 0.0) + value

    def set(self, name: str, labels: Labels, value: float) -> None:
        super().set(name, labels, value)
        self.told[name, labels] = value


def check_told(num_prompt_tokens: int, num_tokens: int, num_requests: int) -> None:
    told = Recorder.told
    model, engine = (MODEL_NAME,), (MODEL_NAME, "mixed", "mixed:0")
    assert told["prompt_tokens_total", model] == num_prompt_tokens
    assert told["generation_tokens_total", model] == num_tokens
    assert told["request_success_total", (MODEL_NAME, "length")] == num_requests
    assert told["request_prompt_tokens", model] == num_prompt_tokens
    assert told["e2e_request_latency_seconds", model] >= told["time_to_first_token_seconds", model] > 0
    assert told["num_requests_running", engine] == told["kv_cache_usage_perc", engine] == 0, "it is over"
    assert ("prefix_cache_queries_total", engine) in told


def test_ray_takes_every_metric() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Ray's word for a bad name
        instruments = RayInstruments("vllm:")
        for metric in METRICS:
            labels = metric.labels
            match metric.kind:
                case "counter":
                    instruments.add(metric.name, labels, 0)
                    instruments.add(metric.name, labels, 2)
                case "gauge":
                    instruments.set(metric.name, labels, 0.5)
                case "histogram":
                    instruments.observe(metric.name, labels, 3.0)
    made = {metric.info["name"]: metric.info["tag_keys"] for metric in instruments._metrics.values()}
    assert made == {f"vllm_{metric.name}": metric.labels for metric in METRICS}


def test_llm_and_batch_jobs_tell_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_metrics, "RayInstruments", Recorder)
    prompts = [[21, 22, 23], [24, 25], [26]]
    with LLM(executor="ray", num_threads_per_worker=1) as llm:
        llm.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True))
    check_told(num_prompt_tokens=6, num_tokens=12, num_requests=3)
    assert Recorder.prefix == "shoal_"

    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    config = JobConfig(
        input=str(source),
        output=str(tmp_path / "out"),
        sampling={"max_tokens": 5, "ignore_eos": True},
        engine=EngineArgs(model=str(BUNDLED_MODEL), num_threads_per_worker=1, metrics_prefix="vllm:"),
    )
    errors = io.StringIO()
    assert batch(config, command=[sys.argv[0]], stdout=io.StringIO(), stderr=errors) == 0, errors.getvalue()
    check_told(num_prompt_tokens=6, num_tokens=15, num_requests=3)
    assert Recorder.prefix == "vllm:"
