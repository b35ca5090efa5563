from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import shoal.cluster.commands.batch
from shoal.cluster.commands.batch import report, resume_command
from shoal.cluster.commands.cli import engine_options, finish, main
from shoal.cluster.engine_args import EngineArgs
from shoal.cluster.jobs.job import JobResult
from shoal.cluster.workers.ray_cluster import LayoutDoesNotFit
from shoal.runtime.request_limits import RequestLimits
from tests.support.checkpoints import make_checkpoint
from tests.support.stub_job import StubEngines

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_checkpoint(directory, "deepseek_v3")
    return directory


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[EngineArgs]:
    """Stub engines stand in for the cluster; the list has the arguments of every start."""
    starts: list[EngineArgs] = []

    def start_engines(args: EngineArgs, **_: Any) -> StubEngines:
        starts.append(args)
        return StubEngines(limits=RequestLimits(vocab_size=10**6, max_model_len=10**6))

    monkeypatch.setattr(shoal.cluster.commands.batch, "start_engines", start_engines)
    return starts


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_help_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from shoal.cluster.commands.cli import main; "
        "assert CliRunner().invoke(main, ['batch', '--help']).exit_code == 0; "
        "sys.exit(bool({'torch', 'ray', 'numpy', 'rich', 'yaml'} & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / ".src")}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["validat"], "Did you mean 'validate'?"),
        (["batch", "--replica_s", "2"], "--replicas"),
        (["batch", "x.jsonl", "--dtype", "fp8"], "is not one of 'auto', 'float32', 'bfloat16'"),
    ],
)
def test_typos_are_usage_errors_with_a_hint(arguments: list[str], hint: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert hint in result.output


def test_every_engine_argument_has_an_option() -> None:
    @click.command()
    @engine_options
    def command(**_: Any) -> None: ...

    names = {parameter.name for parameter in command.params}
    assert {f.name for f in fields(EngineArgs)} - names <= {"max_chunk_size"}


def test_a_batch_prints_its_digest_last(tmp_path: Path, model_dir: Path, started: list[EngineArgs]) -> None:
    source = write_rows(tmp_path / "in.jsonl", {"prompt": [1, 2]}, {"prompt": "text"})
    arguments = ["batch", source, "--model", model_dir, "-o", tmp_path / "out", "-tp", 2, "--no-enable-prefix-caching"]
    first = invoke(*arguments)
    assert first.exit_code == 0, first.output
    assert first.stdout.splitlines()[-1].startswith("output digest: sha256:")
    assert "2 rows, 2 completed, 0 failed" in first.stdout
    assert (started[0].tensor_parallel_size, started[0].enable_prefix_caching) == (2, False)
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["digest"] == first.stdout.splitlines()[-1].removeprefix("output digest: ")
    assert run["layout"] == {"tensor_parallel_size": 2, "data_parallel_size": 1, "replicas": 1}
    assert run["versions"]["torch"]
    # The layout is no part of the job: it is finished under any other one too.
    again = invoke("batch", source, "--model", model_dir, "-o", tmp_path / "out")
    assert (again.exit_code, again.stdout) == (0, first.stdout)
    assert len(started) == 1


def test_bad_rows_exit_3_unless_allowed(tmp_path: Path, model_dir: Path, started: list[EngineArgs]) -> None:
    source = write_rows(tmp_path / "in.jsonl", {"prompt": [1]}, {"prompt": ""})
    arguments = ["batch", source, "--model", model_dir, "-o", tmp_path / "out"]
    assert invoke(*arguments).exit_code == 3
    assert invoke(*arguments, "--max-errors", "50%").exit_code == 0
    assert len(started) == 1


def test_changed_settings_are_refused_by_name(tmp_path: Path, model_dir: Path, started: list[EngineArgs]) -> None:
    source = write_rows(tmp_path / "in.jsonl", {"prompt": [1]})
    arguments = ["batch", source, "--model", model_dir, "-o", tmp_path / "out"]
    assert invoke(*arguments).exit_code == 0
    for more, name in (
        (["--seed", 5], "another seed"),
        (["--dtype", "float32"], "another dtype"),
        (["--kv-cache-dtype", "fp8"], "another kv_cache_dtype"),
    ):
        result = invoke(*arguments, *more)
        assert (result.exit_code, name in result.stderr) == (2, True)
    write_rows(source, {"prompt": [2]})
    result = invoke(*arguments)
    assert (result.exit_code, "another input" in result.stderr) == (2, True)
    assert invoke(*arguments, "--overwrite").exit_code == 0


def test_a_yaml_file_in_place_of_the_input(tmp_path: Path, model_dir: Path, started: list[EngineArgs]) -> None:
    source = write_rows(tmp_path / "in.jsonl", {"prompt": [1]})
    config = tmp_path / "job.yaml"
    config.write_text(f"model: {model_dir}\ninput: {source}\noutput: {tmp_path / 'out'}\nreplicas: 4\n")
    assert invoke("batch", config, "--replicas", 2).exit_code == 0
    assert started[0].replicas == 2
    config.write_text("modle: x\n")
    result = invoke("batch", config)
    assert (result.exit_code, "did you mean model?" in result.stderr) == (2, True)


def test_a_layout_that_does_not_fit_exits_4(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start_engines(args: EngineArgs, **_: Any) -> StubEngines:
        raise LayoutDoesNotFit("needs 8 GPUs, the cluster has 0")

    monkeypatch.setattr(shoal.cluster.commands.batch, "start_engines", start_engines)
    source = write_rows(tmp_path / "in.jsonl", {"prompt": [1]})
    result = invoke("batch", source, "--model", model_dir, "-o", tmp_path / "out")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (4, "error: needs 8 GPUs, the cluster has 0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["batch", "in.jsonl"], "model is missing"),
        (["batch", "--model", "m"], "input is missing"),
        (["batch", "none.jsonl", "--model", "MODEL", "-o", "out"], "none.jsonl is not a file"),
        (["batch", "none.jsonl", "--model", "nowhere", "-o", "out"], "config.json"),
        (["validate", "none.jsonl", "--model", "MODEL"], "cannot read the input"),
    ],
)
def test_what_a_user_can_mend_is_one_line(model_dir: Path, arguments: list[str], message: str) -> None:
    result = invoke(*(str(model_dir) if a == "MODEL" else a for a in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


def test_ctrl_c_before_anything_began_exits_130() -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as error:
        finish(interrupted)
    assert error.value.code == 130


def test_validate_prints_bad_rows(tmp_path: Path, model_dir: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", {"prompt": [1, 2, 3]}, {"prompt": ""}, *([{"n": 1}] * 30))
    result = invoke("validate", source, "--model", model_dir)
    assert result.exit_code == 3
    lines = result.stdout.splitlines()
    assert lines[0] == "line 2, byte 22: empty_prompt: the prompt is empty; give it at least one token"
    assert lines[20] == "... and 11 more"
    assert lines[21] == "32 rows, 31 bad, 3 prompt tokens, the longest prompt has 3"
    assert lines[22] == "  prompts of <=4 tokens: 1"
    assert invoke("validate", write_rows(source, {"prompt": "x"}), "--model", model_dir).exit_code == 0


def test_validate_needs_no_ray(tmp_path: Path, model_dir: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", {"prompt": "x"})
    code = "import sys; sys.modules['ray'] = None; from shoal.cluster.commands.cli import main; main()"
    env = {**os.environ, "PYTHONPATH": str(ROOT / ".src")}
    command = [sys.executable, "-c", code, "validate", str(source), "--model", str(model_dir)]
    assert subprocess.run(command, env=env, check=False).returncode == 0


def test_an_unfinished_job_says_how_to_resume() -> None:
    command = ["shoal", "batch", "my rows.jsonl", "--overwrite", "-o", "out"]
    assert resume_command(command) == "shoal batch 'my rows.jsonl' -o out"
    stdout, stderr = io.StringIO(), io.StringIO()
    result = JobResult(exit_code=130, num_rows=9, completed=4, failed=1, message="stopped by a signal")
    report(result, "out", command, stdout, stderr)
    assert stdout.getvalue() == "out: 9 rows, 4 completed, 1 failed\n"
    assert stderr.getvalue() == "stopped by a signal\nresume with: shoal batch 'my rows.jsonl' -o out\n"
