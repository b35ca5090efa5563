"""`shoal batch`: from a `JobConfig` to an exit status."""

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

from ..environment import versions
from ..jobs.config import JobConfig
from ..jobs.input import file_sha256
from ..jobs.job import Engines, JobResult, JobSpec, run_job
from ..jobs.progress import ProgressReporter
from ..jobs.stop_signal import StopSignal
from ..prompts import ModelPrompts
from ..replicas.start import start_engines
from .validate import row_rules

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)


def batch(config: JobConfig, *, command: Sequence[str], stdout: TextIO, stderr: TextIO) -> int:
    """Run or resume a job and report it: the summary and the digest on stdout, everything else on stderr.

    `command` is what the user typed, for the hint that says how to resume. ValueError for what the user must mend.
    """
    spec = job_spec(config)
    failpoints = Failpoints(os.environ.get(VARIABLE, ""), DRIVER)
    progress = ProgressReporter(stderr)
    if defaults := config.engine.sampling_defaults:
        progress.message(sampling_notice(defaults))

    def start() -> Engines:
        return start_engines(config.engine, on_phase=lambda phase: progress.message(str(phase)))

    try:
        with StopSignal() as stop:
            result = run_job(spec, start, stop=stop, progress=progress, failpoints=failpoints)
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


def job_spec(config: JobConfig) -> JobSpec:
    """Resolve a configuration against the model directory and the input file; reads no weights."""
    engine = config.engine
    rules = row_rules(engine, config.sampling, config.chat_template_kwargs.thinking)
    input_path = Path(config.input)
    if not input_path.is_file():
        raise ValueError(f"the input {input_path} is not a file; give a .jsonl or .jsonl.gz file")
    chat_format = rules.encoder.chat_format if isinstance(rules.encoder, ModelPrompts) else None
    identity = {
        "input": file_sha256(input_path),
        "model": model_fingerprint(Path(engine.model)),
        "dtype": engine.dtype,
        "kv_cache_dtype": engine.kv_cache_dtype,
        "max_model_len": rules.limits.max_model_len,
        "seed": engine.seed,
        "kernel_backend": engine.kernel_backend,
        "invariance": engine.invariance,
        "sampling": dict(rules.sampling),
        "chat_template": {"format": chat_format, "thinking": rules.thinking},
    }
    facts = {
        "model_name": Path(engine.model).name,
        "versions": versions(),
        "layout": engine.layout,
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
