"""`shoal batch`: run the job of a `JobConfig` and report its result."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from shoal.parallel.failpoints import DRIVER, VARIABLE, Failpoints
from shoal.runtime.checkpoint.checkpoint import Checkpoint
from shoal.runtime.generation_config import sampling_notice
from shoal.runtime.memory_estimate import declare_model
from shoal.runtime.models.families import read_config
from shoal.runtime.models.weights import tensor_shapes

from ..environment import versions
from ..jobs.choose_checker import choose_checker
from ..jobs.config import JobConfig
from ..jobs.engine_client import EngineClient
from ..jobs.input.bad_row import BadRow, Place
from ..jobs.input.files import InputFile, file_sha256, find_files, is_url
from ..jobs.input.identity import input_fingerprint
from ..jobs.input.lines import InputLine
from ..jobs.input.rows import InputRow, JobInput
from ..jobs.job import JobResult, JobSpec, run_job
from ..jobs.progress import ProgressReporter
from ..jobs.rows import read_row
from ..jobs.stop_signal import StopSignal
from ..metrics.export import make_meter
from ..openai.requests import RequestDefaults
from ..prompts import ModelPrompts, request_defaults
from ..replicas.start import start_engines
from ..report import check_directory, warnings_shown

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tiktoken.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)


def batch(config: JobConfig, *, command: Sequence[str], stdout: TextIO, stderr: TextIO) -> int:
    """Run or resume a job; print the summary and the digest on stdout, everything else on stderr.

    `command` is the command line, repeated in the hint on resuming. ValueError for a bad setting or file.
    """
    spec = job_spec(config)
    failpoints = Failpoints(os.environ.get(VARIABLE, ""), DRIVER)
    progress = ProgressReporter(stderr, log_format=config.log_format)
    if defaults := config.engine.sampling_defaults:
        progress.message(sampling_notice(defaults))

    def start() -> EngineClient:
        return start_engines(
            config.engine, on_phase=lambda phase: progress.message(str(phase)), on_wait=progress.message
        )

    try:
        with warnings_shown(progress.message), StopSignal() as stop:
            result = run_job(
                spec,
                start,
                stop=stop,
                progress=progress,
                failpoints=failpoints,
                make_meter=lambda: make_meter(config.engine, on_ray=True),
            )
    finally:
        progress.close()
    report(result, config.output, command, stdout, stderr)
    return result.exit_code


def report(result: JobResult, output: str, command: Sequence[str], stdout: TextIO, stderr: TextIO) -> None:
    """Print the result of a job; the digest of a finished one is the last line of stdout."""
    total = "unknown" if result.num_rows is None else result.num_rows
    print(f"{output}: {total} rows, {result.completed} completed, {result.failed} failed", file=stdout)
    if result.digest is not None:
        print(f"output digest: {result.digest}", file=stdout, flush=True)
        return
    stdout.flush()
    print(f"{result.message}\nresume with: {resume_command(command)}", file=stderr, flush=True)


def resume_command(command: Sequence[str]) -> str:
    """The command that resumes a job: the same one without --overwrite."""
    return shlex.join(part for part in command if part != "--overwrite")


def job_spec(config: JobConfig) -> JobSpec:
    """Resolve a configuration against the model directory and the input file, without reading weights."""
    engine = config.engine
    rules = request_defaults(engine, config.sampling, config.chat_template_kwargs.thinking)
    _check_defaults(rules)
    output = Path(config.output)
    files = find_files(config.inputs)
    _check_paths(files, output)
    chat_format = rules.encoder.chat_format if isinstance(rules.encoder, ModelPrompts) else None
    identity = {
        "input": input_fingerprint(files),
        "columns": {
            name: getattr(config, name)
            for name in ("prompt_template", "system_template", "id_column", "keep_columns", "limit")
        },
        "model": model_fingerprint(Path(engine.model)),
        "dtype": engine.dtype,
        "kv_cache_dtype": engine.kv_cache_dtype,
        "max_model_len": rules.limits.max_model_len,
        "seed": engine.seed,
        "kernel_backend": engine.kernel_backend,
        "invariance": engine.invariance,
        "sampling": dict(rules.sampling),
        "chat_template": {"format": chat_format and chat_format.name, "thinking": rules.thinking},
    }
    facts = {
        "model_name": Path(engine.model).name,
        "versions": versions(),
        "layout": engine.layout,
    }
    return JobSpec(
        input=JobInput(files=files, columns=config.columns, limit=config.limit),
        output=output,
        identity=identity,
        rules=rules,
        model_name=Path(engine.model).name,
        stop_at_error_limit=config.on_error == "fail",
        error_limit=config.error_limit,
        drain_grace_s=config.drain_grace_s,
        deadline_s=config.deadline_s,
        checker=choose_checker(
            config,
            engine,
            files,
            limits=rules.limits,
            sampling=config.sampling,
            thinking=config.chat_template_kwargs.thinking,
        ),
        overwrite=config.overwrite,
        facts=facts,
    )


def _check_paths(files: Sequence[InputFile], output: Path) -> None:
    """ValueError for an output directory that is not writable or contains an input."""
    check_directory(output)
    for file in files:
        if not is_url(file.url) and Path(file.url).resolve().is_relative_to(output.resolve()):
            raise ValueError(f"the input {file.url} is inside the output directory {output}; give another directory")


def _check_defaults(rules: RequestDefaults) -> None:
    """ValueError when a row with a prompt of one token and no settings is refused: the job's own settings are wrong."""
    data = b'{"prompt": [0]}'
    try:
        read_row(InputRow(0, 0, Place("line", 1), InputLine(1, 0, len(data), data)), rules)
    except BadRow as error:
        raise ValueError(f"no row can be answered with these settings: {error.message}") from error


def model_fingerprint(model_dir: Path) -> str:
    """Fingerprint of a model, `sha256:<hex>`, over the checkpoint's fingerprint and the tokenizer's files."""
    with Checkpoint(model_dir) as checkpoint:
        config = read_config(model_dir)
        checkpoint.check_names(tensor_shapes(declare_model(config).named_weights()), config.int4_groups)
        hashed = hashlib.sha256(checkpoint.compute_fingerprint().encode())
    for name in _TOKENIZER_FILES:
        path = model_dir / name
        hashed.update(f"{name}={file_sha256(path) if path.is_file() else 'none'};".encode())
    return f"sha256:{hashed.hexdigest()}"
