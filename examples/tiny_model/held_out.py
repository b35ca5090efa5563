#!/usr/bin/env python3
"""Writes the held-out questions that `shoal eval` asks.

python examples/tiny_model/held_out.py shoal/bundled/eval.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tasks import TASKS, held_out_rows

ROWS_PER_TASK = 200


def lines() -> list[str]:
    """One JSON object per question: task, question, answer."""
    return [
        json.dumps({"task": row.task, "question": row.question, "answer": row.answer}) + "\n"
        for task in TASKS
        for row in held_out_rows(task, ROWS_PER_TASK)
    ]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text("".join(lines()), encoding="utf-8")
