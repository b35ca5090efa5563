#!/usr/bin/env python3
"""What `shoal eval` cannot see of the bundled model: MTP acceptance, expert load, and lookup under other selections.

    python examples/tiny_model/evaluate.py shoal/bundled/shoal-tiny --output build/tiny-model/evaluation.json

Teacher-forced on the held-out answers: an answer counts as given when every token of it is the most likely one, which
is what greedy decoding of a right answer comes to.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from data import PAD, PARTS, Encoded, collate, encode
from export import from_checkpoint
from held_out import ROWS_PER_TASK
from model import Mode, TinyModel
from tasks import TASKS, held_out_rows
from torch import Tensor

BATCH_TOKENS = 16384


def encoded_rows(task: str, *, thinking: bool) -> list[Encoded]:
    return [encode(row, thinking=thinking) for row in held_out_rows(task, ROWS_PER_TASK)]


def batches(rows: list[Encoded]) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens, part) of rows in order of length."""
    rows = sorted(rows, key=lambda row: len(row.tokens))
    while rows:
        count = 1
        while count < len(rows) and len(rows[count].tokens) * (count + 1) <= BATCH_TOKENS:
            count += 1
        yield collate(rows[:count])
        rows = rows[count:]


@torch.inference_mode()
def accuracy(model: TinyModel, rows: list[Encoded], mode: Mode) -> float:
    """Share of rows whose whole answer, trace included, is the most likely continuation at every token."""
    right = 0
    for tokens, part in batches(rows):
        _, hidden, _ = model(tokens, tokens != PAD, mode)
        wrong = model.lm_head(hidden[:, :-1]).argmax(-1) != tokens[:, 1:]
        right += int((~(wrong & (part[:, 1:] >= 0)).any(dim=1)).sum())
    return right / len(rows)


@torch.inference_mode()
def mtp_acceptance(model: TinyModel, rows: list[Encoded]) -> float:
    """Share of an answer's tokens that the MTP layer drafts as the model itself then chooses them."""
    accepted = drafted = 0
    for tokens, part in batches(rows):
        real = tokens != PAD
        embedded, hidden, extras = model(tokens, real, "sparse")
        drafts = model.lm_head(model.predict_after_next(embedded, hidden, real, "sparse", extras)).argmax(-1)[:, :-2]
        chosen = model.lm_head(hidden).argmax(-1)[:, 1:-1]  # at i + 1, for i + 2
        learnt = part[:, 2:] >= 0
        accepted += int((drafts == chosen)[learnt].sum())
        drafted += int(learnt.sum())
    return accepted / drafted


@torch.inference_mode()
def expert_load(model: TinyModel) -> list[dict[str, float]]:
    """Per MoE layer, over all tasks in both modes: tokens of the fullest and the emptiest expert over the mean."""
    totals: list[Tensor] = []
    for task in TASKS:
        for thinking in (True, False):
            for tokens, _ in batches(encoded_rows(task, thinking=thinking)):
                _, _, extras = model(tokens, tokens != PAD, "sparse")
                totals = [
                    t + load
                    for t, load in zip(totals or [0] * len(extras.expert_load), extras.expert_load, strict=True)
                ]
    means = [load.float().mean() for load in totals]
    return [
        {"max_over_mean": float(load.max() / mean), "min_over_mean": float(load.min() / mean)}
        for load, mean in zip(totals, means, strict=True)
    ]


def evaluate(directory: Path) -> dict[str, Any]:
    """All figures of a model directory, as `export.py` writes it."""
    model = from_checkpoint(directory)
    assert set(TASKS) == {part.partition("/")[0] for part in PARTS} - {"recall"}
    modes: tuple[Mode, ...] = ("sparse", "dense", "recent")
    return {
        "lookup": {
            name: {mode: accuracy(model, encoded_rows("lookup", thinking=thinking), mode) for mode in modes}
            for name, thinking in (("thinking", True), ("direct", False))
        },
        "mtp_acceptance": {task: mtp_acceptance(model, encoded_rows(task, thinking=True)) for task in TASKS},
        "expert_load": expert_load(model),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    report = evaluate(args.model)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
