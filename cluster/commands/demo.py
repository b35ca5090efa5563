"""`shoal demo`: answer real prompts on Ray workers and in one process, and compare the answers bit by bit."""

from __future__ import annotations

import functools
import json
import multiprocessing
import string
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO

from shoal.parallel.failpoints import DRIVER, Failpoints
from shoal.runtime.tokenization.tokenizer import EOS

from ..bundled import BUNDLED_MODEL
from ..engine_args import EngineArgs, read_model_config
from ..exit_codes import ExitCode
from ..jobs.config import JobConfig
from ..jobs.engine_client import EngineClient
from ..jobs.job import JobResult, run_job
from ..jobs.output import FAULT_FILE, PART_FILE, RUN_FILE
from ..jobs.progress import ProgressReporter
from ..jobs.stop_signal import StopSignal
from ..replicas.inprocess import InProcessEngine
from ..replicas.start import start_engines
from ..report import check_directory, warnings_shown
from ..supervision.fault import read_faults
from ..workers.local_cluster import local_cluster
from .arguments import DemoArgs, Victim
from .batch import job_spec

FAULTS: Mapping[Victim, str] = {
    "prefill:0": "prefill:0:kv.publish:4",
    "decode:0": "decode:0:engine.run:40",
    "node:1": "decode:0:engine.run:40:node",
    "driver": "driver:0:job.answer:3",
}
DRIVER_TIMEOUT_S = 300.0

MAX_MODEL_LEN = 1280
SAMPLING = {"max_tokens": 160, "temperature": 0, "logprobs": 0, "skip_special_tokens": False}
DOCUMENT_ENTRIES = 100


def demo_rows() -> list[dict[str, Any]]:
    """Input of the demo: plain rows and OpenAI batch lines, with and without thinking, greedy and sampled."""

    def ask(question: str, *, thinking: bool = False, **fields: Any) -> dict[str, Any]:
        message = {"role": "user", "content": question}
        return {"messages": [message], "chat_template_kwargs": {"thinking": thinking}, **fields}

    def openai(custom_id: str, url: str, body: dict[str, Any]) -> dict[str, Any]:
        return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}

    sampled = {"temperature": 0.8, "top_p": 0.95}
    document, name, value, other = _document()
    conversation = [
        {"role": "user", "content": f"{document}\nWhat is {name}?"},
        {"role": "assistant", "content": value},
        {"role": "user", "content": f"What is {other}?"},
    ]
    return [
        ask("What is 4821 + 7790?", thinking=True),
        ask("What is 4821 + 7790?"),
        ask("What is 90210 - 1876?", thinking=True),
        ask("What is 90210 - 1876?"),
        ask("What is the sum of 9 8 7 6 5 4?", thinking=True),
        ask("Sort these digits: 7 1 9 4 4 0 2"),
        ask("Reverse this: shoaloffish"),
        ask(f"{document}\nWhat is {name}?", thinking=True),
        ask(f"{document}\nWhat is {name}?"),
        openai(
            "digits", "/v1/chat/completions", {**ask("Put in order: 3 8 1 1 5"), "logprobs": True, "top_logprobs": 3}
        ),
        openai(
            "turns",
            "/v1/chat/completions",
            {"messages": conversation, "chat_template_kwargs": {"thinking": True}, **sampled, "seed": 11},
        ),
        openai(
            "twice", "/v1/chat/completions", {**ask("Add 512 and 87.", thinking=True), **sampled, "seed": 5, "n": 2}
        ),
        openai("text", "/v1/completions", {"prompt": "ab12 cd34 ef56 cd34 ab", "max_tokens": 2, "logprobs": 2}),
    ]


def _document() -> tuple[str, str, str, str]:
    """A document longer than the number of tokens attended to, a name near its start, its value, and another name."""
    letters = string.ascii_lowercase
    names = [letters[i % 26] + letters[(7 * i + 3 * (i // 26)) % 26] for i in range(DOCUMENT_ENTRIES)]
    values = [f"{(37 * i + 11) % 100:02d}" for i in range(DOCUMENT_ENTRIES)]
    text = " ".join(name + value for name, value in zip(names, values, strict=True))
    return text, names[12], values[12], names[70]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Differences between the answers of two jobs with the same input."""

    num_rows: int
    num_tokens: int
    num_differing_tokens: int
    num_differing_logprobs: int

    @property
    def equal(self) -> bool:
        return self.num_differing_tokens == self.num_differing_logprobs == 0

    def __str__(self) -> str:
        return (
            f"compared {self.num_rows} rows, {self.num_tokens} tokens: {self.num_differing_tokens} differing tokens, "
            f"{self.num_differing_logprobs} differing logprobs"
        )


def demo(settings: DemoArgs, *, stdout: TextIO, stderr: TextIO) -> int:
    """Answer prompts with the bundled model on Ray and in one process, and compare; 1 if anything differs.

    With `kill`, the layout is a prefill and a decode replica and a spare; that worker, the node of the decode worker,
    or the process that drives the job is killed in the middle.
    ValueError for a layout that the model or the machine does not support.
    """
    output = Path(settings.output)
    prompts = output / "prompts.jsonl"
    cluster_args = _cluster_args(settings)
    check_directory(output)
    steps = _Steps(stdout)
    with steps.step(f"write {prompts}"):
        config = read_model_config(cluster_args)
        output.mkdir(parents=True, exist_ok=True)
        prompts.write_text("".join(json.dumps(row) + "\n" for row in demo_rows()), encoding="utf-8")
        steps.say(
            f"for shoal-tiny, a trained {config.model_type} of {config.num_hidden_layers} layers with "
            f"{config.n_routed_experts} experts, in which a token attends to {config.index_topk} others"
        )

    workers = cluster_args.num_workers
    with steps.step(f"answer the prompts on {workers} Ray worker{'s' * (workers > 1)}, as `shoal batch` does"):
        first = _answer_on_ray(prompts, output / "answers", cluster_args, settings.kill, steps, stderr)
        _show_end(steps, first)
    if first.exit_code != ExitCode.OK:
        return first.exit_code
    for question, thinking, answer in questions_and_answers(prompts, output / "answers"):
        thought = f"  thought: {thinking}" if thinking else ""
        steps.say(f"{shortened(question, 34):34}  {shortened(answer, 24):24}{thought}")

    with steps.step("answer them again in this process, without Ray, one at a time"):
        second = _answer(prompts, output / "reference", _reference_args(), InProcessEngine, stderr)
        _show_end(steps, second)
    if second.exit_code != ExitCode.OK:
        return second.exit_code
    return judge(output / "answers", output / "reference", stdout)


def _cluster_args(settings: DemoArgs) -> EngineArgs:
    """Settings with the requested layout; with `kill`, a prefill and a decode replica and a spare."""
    layout: dict[str, Any] = {
        "tensor_parallel_size": settings.tensor_parallel_size,
        "data_parallel_size": settings.data_parallel_size,
    }
    if settings.kill is not None:
        layout = {"replicas": ["prefill:1", "decode:1"], "spares": 1}
    return EngineArgs(
        model=str(BUNDLED_MODEL),
        max_model_len=MAX_MODEL_LEN,
        block_size=16,
        num_kv_blocks=256,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        **layout,
    )


def _reference_args() -> EngineArgs:
    """Settings of the reference: one process, one row at a time, no prefix caching."""
    return EngineArgs(
        model=str(BUNDLED_MODEL),
        max_model_len=MAX_MODEL_LEN,
        block_size=16,
        num_kv_blocks=80,
        max_num_seqs=1,
        enable_prefix_caching=False,
    )


def _answer_on_ray(
    prompts: Path, output: Path, args: EngineArgs, kill: Victim | None, steps: _Steps, stderr: TextIO
) -> JobResult:
    if kill is None:
        layout = f"tensor parallel {args.tensor_parallel_size}, data parallel {args.data_parallel_size}"
        steps.say(f"{layout}; experts split over {args.num_workers}")
        return _answer(prompts, output, args, start_engines, stderr)
    steps.say(f"a prefill and a decode replica and a spare; {kill} is killed in the middle")
    result = _answer_disturbed(prompts, output, args, kill, stderr)
    for fault in read_faults(output / FAULT_FILE):
        steps.say(fault)
    return result


def _answer_disturbed(prompts: Path, output: Path, args: EngineArgs, kill: Victim, stderr: TextIO) -> JobResult:
    """Answer the prompts while a worker, a node or the driver is killed."""
    if kill == "driver":
        driver = multiprocessing.get_context("spawn").Process(target=_answer_until_killed, args=(prompts, output, args))
        driver.start()
        driver.join(DRIVER_TIMEOUT_S)
        print(f"   the driver exited with {driver.exitcode}; resuming", file=stderr)
        return _answer(prompts, output, args, start_engines, stderr, overwrite=False)
    start = functools.partial(start_engines, faults=FAULTS[kill])
    if kill != "node:1":
        return _answer(prompts, output, args, start, stderr)
    with local_cluster(num_nodes=args.num_workers + args.spares, num_cpus=1):
        return _answer(prompts, output, args, start, stderr)


def _answer_until_killed(prompts: Path, output: Path, args: EngineArgs) -> None:
    _answer(prompts, output, args, start_engines, sys.stderr, faults=FAULTS["driver"])


def judge(first: Path, second: Path, stdout: TextIO) -> int:
    """Compare the answers and digests of two finished jobs and print the result; returns 0 if they are equal."""
    comparison = compare(first, second)
    same_digest = _digest(first) == _digest(second)
    if not same_digest:
        print("the output digests differ", file=stdout)
    print(comparison, file=stdout, flush=True)
    return ExitCode.OK if comparison.equal and same_digest else ExitCode.DIFFERENT


def compare(first: Path, second: Path) -> Comparison:
    """Compare the answers in two output directories token by token, with their log-probabilities.

    JSON keeps every bit of a float. A token that only one side has counts as different, and so does its logprob.
    """
    a = _choices(first)
    b = _choices(second)
    num_tokens = num_tokens_differ = num_logprobs_differ = 0
    for key in a.keys() | b.keys():
        tokens_a, logprobs_a = a.get(key, ([], []))
        tokens_b, logprobs_b = b.get(key, ([], []))
        num_tokens += max(len(tokens_a), len(tokens_b))
        num_tokens_differ += _num_differing(tokens_a, tokens_b)
        num_logprobs_differ += _num_differing(logprobs_a, logprobs_b)
    return Comparison(len({custom_id for custom_id, _ in a | b}), num_tokens, num_tokens_differ, num_logprobs_differ)


def questions_and_answers(prompts: Path, output: Path) -> Iterator[tuple[str, str, str]]:
    """Question, thinking ("" if none) and answer of each row's first sample, in input order."""
    answers = {row["id"]: row["response"]["body"]["choices"][0] for row in _read_lines(output / PART_FILE)}
    for index, row in enumerate(_read_lines(prompts)):
        body = row.get("body", row)
        choice = answers[f"batch_req_{index}"]
        question = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        message = choice.get("message", {"content": choice.get("text")})
        yield question, message.get("reasoning_content", ""), (message["content"] or "").removesuffix(EOS)


def shortened(text: str, width: int) -> str:
    """Text of at most `width` printable ASCII characters, with a dot for each other character."""
    shown = "".join(c if c.isascii() and c.isprintable() else "." for c in text)
    return shown if len(shown) <= width else shown[: width - 3] + "..."


class _Steps:
    """Prints numbered steps with their durations."""

    def __init__(self, stdout: TextIO) -> None:
        self._stdout = stdout
        self._count = 0

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        self._count += 1
        print(f"{self._count}. {title}", file=self._stdout, flush=True)
        start = time.monotonic()
        yield
        self.say(f"{time.monotonic() - start:.1f} s")

    def say(self, text: str) -> None:
        print(f"   {text}", file=self._stdout, flush=True)


def _answer(
    prompts: Path,
    output: Path,
    args: EngineArgs,
    start: Callable[..., EngineClient],
    stderr: TextIO,
    *,
    overwrite: bool = True,
    faults: str = "",
) -> JobResult:
    config = JobConfig(input=str(prompts), output=str(output), engine=args, sampling=SAMPLING, overwrite=overwrite)
    progress = ProgressReporter(stderr)
    try:
        with warnings_shown(progress.message), StopSignal() as stop:
            return run_job(
                job_spec(config),
                lambda: start(args, on_phase=lambda phase: progress.message(f"   {phase}")),
                stop=stop,
                progress=progress,
                failpoints=Failpoints(faults, DRIVER),
            )
    finally:
        progress.close()


def _show_end(steps: _Steps, result: JobResult) -> None:
    steps.say(
        f"{result.completed} rows completed, {result.failed} failed"
        + (f", {result.message}" if result.digest is None else f"; output digest {result.digest}")
    )


def _choices(output: Path) -> dict[tuple[str, int], tuple[list[int], list[Any]]]:
    """(custom_id, sample index) -> token ids and logprob entry per token."""
    choices = {}
    for row in _read_lines(output / PART_FILE):
        for choice in row["response"]["body"]["choices"]:
            logprobs = choice["logprobs"]
            entries = logprobs["content"] if "content" in logprobs else logprobs["token_logprobs"]
            choices[row["custom_id"], choice["index"]] = (choice["token_ids"], entries)
    return choices


def _digest(output: Path) -> str:
    return str(json.loads((output / RUN_FILE).read_text(encoding="utf-8"))["digest"])


def _num_differing(a: list[Any], b: list[Any]) -> int:
    return [x == y for x, y in zip_longest(a, b)].count(False)


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)
