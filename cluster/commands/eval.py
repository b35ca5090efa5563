"""`shoal eval`: exact-match accuracy on held-out questions, with and without thinking."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TextIO

from shoal.runtime.types import RequestOutput, SamplingParams

from ..bundled import TASKS, Question, questions
from ..engine_args import EngineArgs
from ..exit_codes import ExitCode
from ..llm import LLM
from ..report import engine_errors, line_printer, prepare_report, write_report
from .arguments import EvalArgs, Thinking

MODES: dict[Thinking, tuple[bool, ...]] = {"on": (True,), "off": (False,), "both": (True, False)}
CONFIDENCE_Z = 1.96
"""Standard deviations on each side of a 95 % interval."""

Scores = dict[str, dict[str, dict[str, Any]]]
"""task -> "thinking" or "direct" -> accuracy, low, high (the 95 % interval) and n."""


def evaluate(engine: EngineArgs, args: EvalArgs, *, stdout: TextIO, stderr: TextIO) -> int:
    """Answer greedily, print a table on stdout, progress on stderr, and write the scores to a file.

    ValueError for an unknown task or a model that does not support the questions, EnginesFailed if the engines fail.
    """
    prepare_report(args.report)
    tasks = TASKS if args.tasks is None else tuple(args.tasks.split(","))
    rows = {task: questions([task], args.limit) for task in tasks}
    params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens)
    say = line_printer(stderr)
    scores: Scores = {task: {} for task in tasks}
    with engine_errors(), LLM(on_phase=say, **asdict(engine)) as llm:
        for task in tasks:
            for thinking in MODES[args.thinking]:
                start = time.perf_counter()
                num_right = _num_right(llm, rows[task], params, thinking)
                mode = "thinking" if thinking else "direct"
                scores[task][mode] = score(num_right, len(rows[task]))
                seconds = time.perf_counter() - start
                say(f"{task}, {mode}: {num_right} of {len(rows[task])} right, {seconds:.1f} s")
    print(table(scores), file=stdout, flush=True)
    write_report(args.report, scores)
    return ExitCode.OK


def _num_right(llm: LLM, rows: Sequence[Question], params: SamplingParams, thinking: bool) -> int:
    conversations = [[{"role": "user", "content": row.question}] for row in rows]
    outputs = llm.chat(conversations, params, thinking=thinking)
    return sum(final_answer(o) == row.answer for o, row in zip(outputs, rows, strict=True))


def final_answer(output: RequestOutput) -> str | None:
    """The content of the answer; None for one that is cut off."""
    (completion,) = output.outputs
    assert completion.message is not None
    content: str | None = completion.message["content"]
    if completion.finish_reason != "stop" or content is None:
        return None
    return content.strip()


def score(right: int, count: int) -> dict[str, Any]:
    """Accuracy and its 95 % confidence interval."""
    low, high = wilson_interval(right, count)
    return {"accuracy": round(right / count, 4), "low": round(low, 4), "high": round(high, 4), "n": count}


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """The Wilson score interval (Wilson, 1927) of `right` successes in `count` trials, at 95 %."""
    share = right / count
    z2 = CONFIDENCE_Z**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = CONFIDENCE_Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def table(scores: Scores) -> str:
    """One line per task: accuracy and interval of each evaluated mode."""
    modes = [mode for mode in ("thinking", "direct") if any(mode in of_task for of_task in scores.values())]
    lines = [(f"{'task':14}{'n':>6}" + "".join(f"  {mode:22}" for mode in modes)).rstrip()]
    for task, of_task in scores.items():
        cells = [of_task[mode] for mode in modes]
        shown = "".join(f"  {c['accuracy']:.3f} ({c['low']:.3f}-{c['high']:.3f})   " for c in cells)
        lines.append(f"{task:14}{cells[0]['n']:6}{shown}".rstrip())
    return "\n".join(lines)
