from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shoal.cluster.jobs.config import ErrorLimit, job_config
from shoal.cluster.jobs.job_file import load_job_config

MINIMAL = {"model": "m", "input": "in.jsonl", "output": "out"}

FULL = """
model: /models/tiny
input: rows.jsonl
output: out
tensor_parallel_size: 2
replicas: 3
dtype: float32
max_model_len: null
enable_prefix_caching: false
sampling:
  temperature: 0.5
  stop: [a, b]
chat_template_kwargs:
  thinking: true
on_error: fail
max_errors: 2%
drain_grace_s: 3
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return path


def test_a_file_holds_everything(tmp_path: Path) -> None:
    config = load_job_config(write(tmp_path, FULL), {})
    assert (config.input, config.output, config.on_error, config.drain_grace_s) == ("rows.jsonl", "out", "fail", 3)
    assert (config.engine.model, config.engine.tensor_parallel_size, config.engine.replicas) == ("/models/tiny", 2, 3)
    assert (config.engine.dtype, config.engine.max_model_len, config.engine.enable_prefix_caching) == (
        "float32",
        None,
        False,
    )
    assert config.sampling == {"temperature": 0.5, "stop": ["a", "b"]}
    assert config.chat_template_kwargs.thinking
    assert config.error_limit == ErrorLimit(percent=2.0)


@pytest.mark.parametrize("page", ["README.md", "docs/cluster.md"])
def test_the_example_of_the_documents(tmp_path: Path, page: str) -> None:
    text = (Path(__file__).parents[3] / page).read_text()
    config = load_job_config(write(tmp_path, text.split("```yaml\n")[1].split("```")[0]), {})
    specs = config.engine.replica_specs
    assert [(s.role, s.tensor_parallel_size, s.data_parallel_size) for s in specs] == [
        ("prefill", 2, 1),
        ("prefill", 2, 1),
        ("decode", 1, 8),
    ]
    assert (config.engine.spares, config.engine.num_workers) == (1, 12)


def test_flags_stand_before_the_file(tmp_path: Path) -> None:
    config = load_job_config(write(tmp_path, FULL), {"replicas": 1, "output": "other", "overwrite": True})
    assert (config.engine.replicas, config.output, config.overwrite) == (1, "other", True)
    assert config.engine.tensor_parallel_size == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensor-parallel-size: 2", "tensor-parallel-size is not a known setting; did you mean tensor_parallel_size?"),
        ("sampling: {temprature: 1}", "sampling.temprature is not a known setting; did you mean temperature?"),
        (
            "chat_template_kwargs: {think: true}",
            "chat_template_kwargs.think is not a known setting; did you mean thinking?",
        ),
        ("engine: {}", "engine is not a known setting; known are"),
        ("replicas: two", "replicas must be a whole number between 1 and 100000 or a list of values, got 'two'"),
        ("replicas: true", "replicas must be .*, got True"),
        ("max_model_len: 1.5", "max_model_len must be a whole number of at least 1 or null, got 1.5"),
        ("enable_prefix_caching: 'no'", "enable_prefix_caching must be true or false, got 'no'"),
        ("dtype: fp8", "dtype must be one of auto, float32, bfloat16, got 'fp8'"),
        ("on_error: stop", "on_error must be one of continue, fail, got 'stop'"),
        ("chat_template_kwargs: {thinking: 1}", "chat_template_kwargs.thinking must be true or false or null, got 1"),
        ("sampling: [1]", r"sampling must be a mapping \(key: value\)"),
        ("overwrite: true", "overwrite is a flag only"),
        ("replicas: 1\nreplicas: 2", "the key replicas is given twice"),
        ("[1, 2]", "must hold a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_wrong_file_names_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_job_config(write(tmp_path, text), MINIMAL)
    assert "job.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replicas": 0}, "replicas must be"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be"),
        ({"sampling": {"temperature": -1}}, "sampling.temperature must be a number between 0 and 100, got -1"),
        ({"max_errors": "many"}, "max_errors must be a number of rows"),
        ({"drain_grace_s": -1.0}, "drain_grace_s must be a number of at least 0, got -1.0"),
    ],
)
def test_a_wrong_value_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job_config({**MINIMAL, **changes})


@pytest.mark.parametrize("missing", ["model", "input", "output"])
def test_what_is_missing_is_named(missing: str) -> None:
    with pytest.raises(ValueError, match=f"{missing} is missing; give"):
        job_config({name: value for name, value in MINIMAL.items() if name != missing})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.yaml: cannot be read"):
        load_job_config(tmp_path / "none.yaml", {})


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    assert load_job_config(write(tmp_path, ""), MINIMAL) == job_config(MINIMAL)


@pytest.mark.parametrize(
    ("text", "failed", "rows", "allowed"),
    [
        (0, 0, 10, True),
        (0, 1, 10, False),
        ("3", 3, 10, True),
        (3, 4, 10, False),
        ("2%", 2, 100, True),
        ("2%", 3, 100, False),
        ("2.5 %", 1, 40, True),
        ("2.5%", 1, 39, False),
        ("0%", 0, 0, True),
    ],
)
def test_error_limits(text: int | str, failed: int, rows: int, allowed: bool) -> None:
    assert ErrorLimit.parse(text).allows(failed, rows) is allowed


@pytest.mark.parametrize("text", ["-1", "x", "101%", "-1%", "nan%", "", "1.5"])
def test_wrong_error_limits(text: str) -> None:
    with pytest.raises(ValueError, match="max_errors must be"):
        ErrorLimit.parse(text)
