#!/usr/bin/env python3
"""Writes the model card of shoal-tiny, and the results, from what was measured; no number in them is typed.

python examples/tiny_model/model_card.py --model shoal/bundled/shoal-tiny --log build/tiny-model/log.jsonl
    --scores build/tiny-model/scores.json --evaluation build/tiny-model/evaluation.json
    --results benchmarks/results/tiny-model.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

SIZES = {
    "addition": "2 to 8 digits",
    "subtraction": "2 to 6 digits, never below zero",
    "sorting": "3 to 12 digits",
    "copying": "4 to 40 characters",
    "reversing": "4 to 40 characters",
    "running_sum": "2 to 10 digits",
    "lookup": "one value of a document of 128 to 1024 tokens",
}

TEMPLATE = Path(__file__).with_name("model_card.md")

CURVE_LINES = 12


def score_table(scores: dict[str, Any]) -> str:
    def cell(of_task: dict[str, Any], mode: str) -> str:
        return "{accuracy:.3f} ({low:.3f}-{high:.3f})".format(**of_task[mode])

    lines = ["| task | size | n | thinking | not thinking |", "|---|---|---|---|---|"]
    for task, of_task in scores.items():
        n = of_task["thinking"]["n"]
        lines.append(f"| {task} | {SIZES[task]} | {n} | {cell(of_task, 'thinking')} | {cell(of_task, 'direct')} |")
    return "\n".join(lines)


def curve(log: list[dict[str, Any]]) -> str:
    chosen = [log[(len(log) - 1) * i // (CURVE_LINES - 1)] for i in range(CURVE_LINES)]

    def cell(line: dict[str, Any], name: str) -> str:
        return f"{line[name]:.3f}" if name in line else ""

    names = ("loss", "index_kl", "mtp_acceptance", "balance")
    return "\n".join(
        f"| {line['seconds'] / 60:.0f} min | {line['mode']} | " + " | ".join(cell(line, n) for n in names) + " |"
        for line in chosen
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "log", "scores", "evaluation", "results"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    config = json.loads((args.model / "config.json").read_text())
    with safe_open(args.model / "model.safetensors", "pt") as tensors:
        sizes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    parameters = sum(int(s[0]) * int(s[1] if len(s) > 1 else 1) for s in sizes)
    log = [json.loads(line) for line in args.log.read_text().splitlines()]
    scores, evaluation = json.loads(args.scores.read_text()), json.loads(args.evaluation.read_text())
    training = {
        "steps": log[-1]["step"],
        "seconds": log[-1]["seconds"],
        "tokens": sum(line["tokens"] for line in log),
    }
    lookup, load = evaluation["lookup"]["thinking"], evaluation["expert_load"]
    text = TEMPLATE.read_text(encoding="utf-8").format(
        parameters=parameters / 1e6,
        index_topk=config["index_topk"],
        experts=config["n_routed_experts"],
        groups=config["n_group"],
        top_k=config["num_experts_per_tok"],
        scores=score_table(scores),
        **{mode: lookup[mode] for mode in ("sparse", "dense", "recent")},
        acceptance=", ".join(f"{task} {share:.2f}" for task, share in evaluation["mtp_acceptance"].items()),
        load=", ".join(f"{layer['max_over_mean']:.2f}" for layer in load),
        least=", ".join(f"{layer['min_over_mean']:.2f}" for layer in load),
        minutes=training["seconds"] / 60,
        steps=training["steps"],
        tokens=training["tokens"] / 1e6,
        curve=curve(log),
    )
    (args.model / "README.md").write_text(text, encoding="utf-8")
    report = {"command": "make tiny-model", "training": training, "scores": scores, "evaluation": evaluation}
    args.results.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
