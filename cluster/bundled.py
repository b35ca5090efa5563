"""The model inside the package, shoal-tiny, and questions that were held out of its training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import shoal

_DIRECTORY = Path(shoal.__file__).resolve().parent / "bundled"
BUNDLED_MODEL = _DIRECTORY / "shoal-tiny"
"""Model directory of shoal-tiny; its README.md says what the model can do."""
_QUESTIONS = _DIRECTORY / "eval.jsonl"

TASKS = ("addition", "subtraction", "sorting", "copying", "reversing", "running_sum", "lookup")


@dataclass(frozen=True, slots=True)
class Question:
    """A question with one right answer, which was held out of shoal-tiny's training."""

    task: str
    question: str
    answer: str


def questions(tasks: Sequence[str] = TASKS, limit: int | None = None) -> list[Question]:
    """The held-out questions of the tasks, at most `limit` of each; ValueError names a task that does not exist."""
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"there is no task {', '.join(unknown)}; known are {', '.join(TASKS)}")
    chosen: dict[str, list[Question]] = {task: [] for task in tasks}
    with _QUESTIONS.open(encoding="utf-8") as lines:
        for line in lines:
            row = Question(**json.loads(line))
            if row.task in chosen and (limit is None or len(chosen[row.task]) < limit):
                chosen[row.task].append(row)
    return [row for rows in chosen.values() for row in rows]
