"""`shoal batch` and `shoal validate`: from a `JobConfig` to an exit status."""

from __future__ import annotations

import hashlib
import platform
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from shoal.runtime.loader import Checkpoint
from shoal.runtime.tokenizer import Tokenizer
from shoal.runtime.validation import RequestLimits

from .batch_input import BadRow, CustomIdIndex, InputLine, file_sha256
from .batch_rows import RowRules
from .batch_validation import InputSummary, validate_input
from .engine_args import EngineArgs
from .job import EXIT_OK, EXIT_ROWS_FAILED, Engines, JobResult, JobSpec, run_job
from .job_config import JobConfig
from .progress import JobProgress, ProgressReporter
from .prompts import ModelPrompts
from .router import read_model_config, start_engines
from .row_output import FinishedRow
from .stop_signal import JobStopped, StopSignal

CHAT_FORMAT = "deepseek-v3.1"
MAX_SHOWN_BAD_ROWS = 20

_PACKAGES = ("shoal", "torch", "ray", "numpy", "tokenizers")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def batch(config: JobConfig, *, command: Sequence[str], stdout: TextIO, stderr: TextIO) -> int:
    """Run or resume a job and report it: the summary and the digest on stdout, everything else on stderr.

    `command` is what the user typed, for the hint that says how to resume. ValueError for what the user must mend.
    """
    spec = job_spec(config)
    progress = ProgressReporter(stderr)

    def start() -> Engines:
        return start_engines(config.engine, on_phase=lambda phase: progress.message(str(phase)))

    try:
        with StopSignal() as stop:
            result = run_job(spec, start, stop=stop, progress=progress)
    finally:
        progress.close()
    report(result, config.output, command, stdout, stderr)
    return result.exit_code


def report(result: JobResult, output: str, command: Sequence[str], stdout: TextIO, stderr: TextIO) -> None:
    """Say how a job ended; of a finished one the digest is the last line of stdout."""
    total = "unknown" if result.num_rows is None else result.num_rows
    print(f"{output}: {total} rows, {result.completed} completed, {result.failed} failed", file=stdout)
    if result.digest is not None:
        print(f"output digest: {result.digest}", file=stdout, flush=True)
        return
    stdout.flush()
    print(f"{result.message}\nresume with: {resume_command(command)}", file=stderr, flush=True)


def resume_command(command: Sequence[str]) -> str:
    """The command that continues a job: the same, without starting over."""
    return shlex.join(part for part in command if part != "--overwrite")


def validate(
    input_path: Path, engine: EngineArgs, *, sampling: Mapping[str, Any], thinking: bool, stdout: TextIO, stderr: TextIO
) -> int:
    """Check an input against a model and print what is wrong with it; 3 if a row is bad."""
    rules = _rules(engine, sampling, thinking)
    progress = ProgressReporter(stderr)
    num_shown = 0

    def on_bad_row(_row: FinishedRow, error: BadRow, line: InputLine) -> None:
        nonlocal num_shown
        num_shown += 1
        if num_shown <= MAX_SHOWN_BAD_ROWS:
            print(f"line {line.number}, byte {line.byte_offset}: {error.code}: {error.message}", file=stdout)

    try:
        with StopSignal() as stop, tempfile.TemporaryDirectory() as directory:

            def on_row(summary: InputSummary) -> None:
                stop.check()
                good = summary.num_rows - summary.num_bad_rows
                now = JobProgress(phase="checking", num_rows=None, completed=good, failed=summary.num_bad_rows)
                progress.update(now)

            custom_ids = CustomIdIndex(Path(directory) / "custom_ids.sqlite")
            try:
                summary = validate_input(input_path, rules, custom_ids, on_bad_row, on_row)
            finally:
                custom_ids.close()
    except JobStopped:
        return stop.exit_code
    finally:
        progress.close()
    if num_shown > MAX_SHOWN_BAD_ROWS:
        print(f"... and {num_shown - MAX_SHOWN_BAD_ROWS} more", file=stdout)
    print(
        f"{summary.num_rows} rows, {summary.num_bad_rows} bad, {summary.num_prompt_tokens} prompt tokens, the longest "
        f"prompt has {summary.max_prompt_tokens}",
        file=stdout,
    )
    for length, count in summary.to_dict()["prompt_lengths"].items():
        print(f"  prompts of {length} tokens: {count}", file=stdout)
    return EXIT_ROWS_FAILED if summary.num_bad_rows else EXIT_OK


def job_spec(config: JobConfig) -> JobSpec:
    """Resolve a configuration against the model directory and the input file; reads no weights."""
    engine = config.engine
    rules = _rules(engine, config.sampling, config.chat_template_kwargs.thinking)
    input_path = Path(config.input)
    if not input_path.is_file():
        raise ValueError(f"the input {input_path} is not a file; give a .jsonl or .jsonl.gz file")
    identity = {
        "input": file_sha256(input_path),
        "model": model_fingerprint(Path(engine.model)),
        "dtype": engine.dtype,
        "max_model_len": rules.limits.max_model_len,
        "seed": engine.seed,
        "kernel_backend": engine.kernel_backend,
        "invariance": engine.invariance,
        "sampling": dict(config.sampling),
        "chat_template": {"format": CHAT_FORMAT, "thinking": rules.thinking},
    }
    facts = {
        "model_name": Path(engine.model).name,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "layout": {
            "tensor_parallel_size": engine.tensor_parallel_size,
            "data_parallel_size": engine.data_parallel_size,
            "replicas": engine.replicas,
        },
    }
    return JobSpec(
        input=input_path,
        output=Path(config.output),
        identity=identity,
        rules=rules,
        model_name=Path(engine.model).name,
        stop_at_error_limit=config.on_error == "fail",
        error_limit=config.error_limit,
        drain_grace_s=config.drain_grace_s,
        overwrite=config.overwrite,
        facts=facts,
    )


def model_fingerprint(model_dir: Path) -> str:
    """`sha256:<hex>` of what tells models apart: `Checkpoint.fingerprint` and the tokenizer's files."""
    with Checkpoint(model_dir) as checkpoint:
        hashed = hashlib.sha256(checkpoint.fingerprint.encode())
    for name in _TOKENIZER_FILES:
        path = model_dir / name
        hashed.update(f"{name}={file_sha256(path) if path.is_file() else 'none'};".encode())
    return f"sha256:{hashed.hexdigest()}"


def _rules(engine: EngineArgs, sampling: Mapping[str, Any], thinking: bool) -> RowRules:
    model = read_model_config(engine)
    limits = RequestLimits(
        vocab_size=model.vocab_size, max_model_len=engine.max_model_len or model.max_position_embeddings
    )
    tokenizer = Tokenizer.from_pretrained(engine.model)
    encoder = None if tokenizer is None else ModelPrompts(tokenizer)
    return RowRules(limits=limits, encoder=encoder, sampling=sampling, thinking=thinking)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed as a package"
