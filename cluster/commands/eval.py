"""`shoal eval`: the share of held-out questions that a model answers exactly, thinking and not."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TextIO

from shoal.runtime.tokenization.tokenizer import EOS, THINK_END
from shoal.runtime.types import RequestOutput, SamplingParams

from ..bundled import questions
from ..engine_args import EngineArgs
from ..jobs.job import EXIT_ENGINE, EXIT_OK
from ..llm import LLM

Thinking = Literal["on", "off", "both"]
MODES: dict[Thinking, tuple[bool, ...]] = {"on": (True,), "off": (False,), "both": (True, False)}
CONFIDENCE_Z = 1.96
"""Of a 95 % interval."""

Scores = dict[str, dict[str, dict[str, Any]]]
"""task -> "thinking" or "direct" -> accuracy, low, high (the 95 % interval) and n."""


def evaluate(
    args: EngineArgs,
    *,
    tasks: Sequence[str],
    thinking: Thinking,
    limit: int | None,
    max_tokens: int,
    output: Path | None,
    stdout: TextIO,
    stderr: TextIO,
) -> int:
    """Answer greedily, print a table on stdout and write the scores to `output`; progress goes to stderr.

    ValueError for an unknown task or a model that cannot take the questions; 5 if the engines fail.
    """
    if output is not None and output.is_dir():
        raise ValueError(f"{output} is a directory; give the name of a file")
    asked = {task: questions([task], limit) for task in tasks}
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, skip_special_tokens=False)

    def say(text: str) -> None:
        print(text, file=stderr, flush=True)

    scores: Scores = {task: {} for task in tasks}
    try:
        with LLM(on_phase=lambda phase: say(str(phase)), **asdict(args)) as llm:
            for task, rows in asked.items():
                for think in MODES[thinking]:
                    begin = time.perf_counter()
                    conversations = [[{"role": "user", "content": row.question}] for row in rows]
                    outputs = llm.chat(conversations, params, thinking=think)
                    right = sum(final_answer(o, think) == row.answer for o, row in zip(outputs, rows, strict=True))
                    mode = "thinking" if think else "direct"
                    scores[task][mode] = score(right, len(rows))
                    say(f"{task}, {mode}: {right} of {len(rows)} right, {time.perf_counter() - begin:.1f} s")
    except RuntimeError as error:
        say(f"error: the engines failed: {error}")
        return EXIT_ENGINE
    print(table(scores), file=stdout, flush=True)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    return EXIT_OK


def final_answer(output: RequestOutput, thinking: bool) -> str | None:
    """What follows the thinking, without the end-of-sentence token; None for an answer that was cut off."""
    (completion,) = output.outputs
    if completion.finish_reason != "stop":
        return None
    text = completion.text.removesuffix(EOS)
    if thinking:
        _, end, text = text.partition(THINK_END)
        if not end:
            return None
    return text.strip()


def score(right: int, count: int) -> dict[str, Any]:
    """Accuracy and its 95 % confidence interval."""
    low, high = wilson_interval(right, count)
    return {"accuracy": round(right / count, 4), "low": round(low, 4), "high": round(high, 4), "n": count}


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """The Wilson score interval (Wilson, 1927) of `right` successes in `count` trials, at 95 %."""
    share, z2 = right / count, CONFIDENCE_Z**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = CONFIDENCE_Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def table(scores: Scores) -> str:
    """One line per task: accuracy and interval of each mode that was asked."""
    modes = [mode for mode in ("thinking", "direct") if any(mode in of_task for of_task in scores.values())]
    lines = [(f"{'task':14}{'n':>6}" + "".join(f"  {mode:22}" for mode in modes)).rstrip()]
    for task, of_task in scores.items():
        cells = [of_task[mode] for mode in modes]
        shown = "".join(f"  {c['accuracy']:.3f} ({c['low']:.3f}-{c['high']:.3f})   " for c in cells)
        lines.append(f"{task:14}{cells[0]['n']:6}{shown}".rstrip())
    return "\n".join(lines)
