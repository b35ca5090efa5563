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
from shoal.cluster.commands.cli import main
from shoal.cluster.commands.options import exits, options
from shoal.cluster.engine_args import EngineArgs
from shoal.cluster.jobs.job import JobResult
from shoal.cluster.workers.ray_cluster import LayoutDoesNotFit
from shoal.runtime.random_checkpoint import make_checkpoint
from shoal.runtime.request_limits import RequestLimits
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
    @options(EngineArgs)
    def command(**_: Any) -> None: ...

    assert {parameter.name for parameter in command.params} == {f.name for f in fields(EngineArgs)}


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
        (["validate", "none.jsonl", "--model", "MODEL"], "none.jsonl is not a file"),
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
        exits(interrupted)()
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


def written(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("sampling: {stop: 5}", "sampling.stop must be non-empty text, a list of non-empty texts or null, got 5"),
        ("sampling: {stop_token_ids: 1}", "sampling.stop_token_ids must be a list of whole numbers"),
        ("sampling: {stop_token_ids: [x]}", "sampling.stop_token_ids must be a list of whole numbers"),
        ("sampling: {logit_bias: [1, 2]}", "sampling.logit_bias must be a mapping (key: value) or null, got [1, 2]"),
        ("sampling: {logit_bias: {a: 1}}", "sampling.logit_bias key must be a whole number of at least 0, got 'a'"),
        ("sampling: {temperature: .nan}", "sampling.temperature must be a number between 0 and 100, got nan"),
        ("sampling: {temperature: hot}", "sampling.temperature must be a number between 0 and 100, got 'hot'"),
        ("sampling: {max_tokens: 0}", "sampling.max_tokens must be a whole number of at least 1 or null, got 0"),
        ("sampling: {min_tokens: 20}", "sampling.min_tokens (20) is above max_tokens (16)"),
        ("sampling: {stop_token_ids: [99999]}", "stop token id 99999 is outside the vocabulary"),
        ("sampling: {logit_bias: {99999: 1}}", "logit_bias token id 99999 is outside the vocabulary"),
        ("sampling: {logprobs: 1000}", "1000 logprobs were asked for, but the vocabulary has 320 tokens"),
        ("sampling: null", "sampling must be a mapping (key: value), got None"),
        ("sampling: [temperature]", "sampling must be a mapping"),
        ("chat_template_kwargs: thinking", "chat_template_kwargs must be a mapping (key: value), got 'thinking'"),
        ("drain_grace_s: .inf", "drain_grace_s must be a number of at least 0, got inf"),
        ("max_errors: true", "max_errors must be a whole number of at least 0 or non-empty text, got True"),
        ("max_errors: 2.5", "max_errors must be"),
        ("max_errors: [1]", "max_errors must be"),
        ("seed: 99999999999999999999", "seed must fit into 64 bits"),
        ("block_size: '16'", "block_size must be a whole number of at least 1, got '16'"),
        ("block_size: [16]", "block_size must be a whole number of at least 1, got [16]"),
        ("ray_address: ''", "ray_address must be non-empty text or null, got ''"),
        ("replicas: {role: mixed}", "replicas must be a whole number between 1 and 100000 or a list of values"),
        ("? [a, b]\n: 1", "not valid YAML: a key must be a single word"),
        ("a: " + "[" * 5000, "not valid YAML: nested too deeply"),
        ("---\nseed: 1\n---\nseed: 2", "not valid YAML"),
        ("- seed", "not valid YAML"),
    ],
)
def test_a_setting_that_makes_no_sense_is_one_line_and_starts_nothing(
    tmp_path: Path, model_dir: Path, started: list[EngineArgs], settings: str, message: str
) -> None:
    source = write_rows(tmp_path / "in.jsonl", {"prompt": [1]})
    job = tmp_path / "job.yaml"
    job.write_text(f"model: {model_dir}\ninput: {source}\noutput: {tmp_path / 'out'}\n{settings}\n")
    result = invoke("batch", job)
    assert (result.exit_code, started, written(tmp_path)) == (2, [], ["in.jsonl", "job.yaml"]), result.output
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["INPUT", "--output", ""], "output must be a path, got ''"),
        (["INPUT", "--output", "   "], "output must be a path, got '   '"),
        (["INPUT", "--output", "INPUT"], "in.jsonl is not a directory; give another place than"),
        (["INPUT", "--output", "INPUT/out"], "in.jsonl is not a directory; give another place than"),
        (["INPUT", "--output", "."], "is inside the output directory .; give another directory"),
        (["INPUT", "--output", ".", "--overwrite"], "is inside the output directory .; give another directory"),
        (["", "--output", "out"], "input must be a path or a list of paths, got ''"),
        (["INPUT", "--output", "out", "--model", ""], "model must be a path, got ''"),
        (["INPUT", "--output", "out", "--config", ""], "config is empty; give the path of a YAML file"),
        (["INPUT", "--output", "out", "--max-errors", ""], "max_errors must be"),
        (["INPUT", "--output", "out", "--heartbeat-timeout-s", "nan"], "heartbeat_timeout_s must be a number above 0"),
        (["INPUT", "--output", "out", "--replicas", ""], "replicas[0]: role must be one of"),
        (["INPUT", "--output", "out", "--replicas", "prefill:0"], "replicas[0]: count must be a whole number between"),
    ],
)
def test_a_place_that_makes_no_sense_is_one_line_and_starts_nothing(
    tmp_path: Path,
    model_dir: Path,
    started: list[EngineArgs],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "in.jsonl", {"prompt": [1]})
    model = [] if "--model" in arguments else ["--model", str(model_dir)]
    result = invoke("batch", *(a.replace("INPUT", "in.jsonl") for a in arguments), *model)
    assert (result.exit_code, started, written(tmp_path)) == (2, [], ["in.jsonl"]), result.output
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--output", ""],
        ["demo", "--output", "file"],
        ["eval", "--output", ""],
        ["eval", "--output", "file/scores.json"],
        ["eval", "--tasks", ""],
        ["doctor", "--output", "file/findings.json"],
        ["bench", "kernels", "--output", ""],
        ["bench", "kernels", "--threads", "0"],
        ["bench", "throughput", "--model", "MODEL", "--output", "file/figures.json"],
        ["bench", "throughput", "--model", "MODEL", "--executor", ""],
        ["validate", "", "--model", "MODEL"],
    ],
)
def test_no_command_starts_with_a_setting_that_makes_no_sense(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    result = invoke(*(a.replace("MODEL", str(model_dir)) for a in arguments))
    assert (result.exit_code, result.stdout, written(tmp_path)) == (2, "", ["file"]), result.output
