#!/usr/bin/env python3
"""Trains shoal-tiny from nothing: data-parallel processes with one thread each, resumable, on the CPU.

    python benchmarks/tiny_model/train.py --output build/tiny-model

Three phases: dense attention; the indexer alone learns what dense attention looks at; sparse attention, in which the
indexer keeps learning from the attention over what it selected. Each task's questions grow as its accuracy allows.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from data import PAD, PARTS, Encoded, collate, long_batch, short_batch
from model import Mode, MoE, TinyModel
from torch import Tensor

PEAK_LR, FINAL_LR, WARMUP_STEPS = 2e-3, 1e-4, 100
WARMUP_PHASE, SPARSE_PHASE = 0.58, 0.63
"""Where the phases begin, as fractions of all steps."""
BIAS_STEP, BIAS_FROZEN = 0.004, 0.9
LEVEL_STEP, LEVEL_ACCURACY = 0.02, 0.9
REPORT_EVERY, SAVE_EVERY = 20, 500


class Levels:
    """The size of each task's questions, 0 to 1: it grows while those asked are answered."""

    def __init__(self) -> None:
        self.level: dict[str, float] = defaultdict(float)
        self.accuracy: dict[str, float] = defaultdict(float)

    def __call__(self, task: str) -> float:
        return self.level[task]

    def update(self, right: dict[str, tuple[int, int]]) -> None:
        """`right`: part -> (rows answered without a wrong token, rows)."""
        for part, (correct, count) in right.items():
            if not count:
                continue
            self.accuracy[part] = 0.9 * self.accuracy[part] + 0.1 * correct / count
            task, _, mode = part.partition("/")
            if mode == "thinking" and self.accuracy[part] > LEVEL_ACCURACY:
                self.level[task] = min(1.0, self.level[task] + LEVEL_STEP)


def phase(progress: float) -> Mode:
    return "dense" if progress < WARMUP_PHASE else "warmup" if progress < SPARSE_PHASE else "sparse"


def learning_rate(step: int, steps: int) -> float:
    if step < WARMUP_STEPS:
        return PEAK_LR * (step + 1) / WARMUP_STEPS
    left = 1 - (step - WARMUP_STEPS) / (steps - WARMUP_STEPS)
    return FINAL_LR + (PEAK_LR - FINAL_LR) * left


def batch_of(step: int, args: argparse.Namespace, rank: int, levels: Levels, progress: float) -> list[Encoded]:
    rng = random.Random(f"{args.seed}/{step}/{rank}")
    if rng.random() < args.long_share:
        return long_batch(rng, levels, args.tokens, recall_share=max(0.1, 0.8 - 2 * progress))
    return short_batch(rng, levels, args.tokens)


def losses(model: TinyModel, rows: list[Encoded], mode: Mode, mtp_weight: float) -> tuple[Tensor, dict[str, Any]]:
    tokens, part = collate(rows)
    real = tokens != PAD
    hidden, hidden_mtp, extras = model(tokens, real, mode)
    # position i predicts token i + 1, the MTP layer token i + 2
    learnt, learnt_mtp = part[:, 1:] >= 0, part[:, 2:] >= 0
    logits = model.lm_head(hidden[:, :-1][learnt])
    loss = F.cross_entropy(logits, tokens[:, 1:][learnt])
    logits_mtp = model.lm_head(hidden_mtp[:, :-2][learnt_mtp])
    target_mtp = tokens[:, 2:][learnt_mtp]
    loss_mtp = F.cross_entropy(logits_mtp, target_mtp)
    total = loss + mtp_weight * loss_mtp
    index_kl = torch.stack(extras.index_kl).mean() if extras.index_kl else None
    if index_kl is not None:
        total = index_kl if mode == "warmup" else total + index_kl
    right = torch.zeros(tokens.shape[0], tokens.shape[1] - 1, dtype=torch.bool)
    right[learnt] = logits.argmax(-1) == tokens[:, 1:][learnt]
    facts = {
        "loss": loss.item(),
        "loss_mtp": loss_mtp.item(),
        "index_kl": index_kl.item() if index_kl is not None else None,
        "mtp_acceptance": (logits_mtp.argmax(-1) == target_mtp).float().mean().item(),
        "load": torch.stack(extras.expert_load),
        "right": answered(right, part[:, 1:]),
        "tokens": int(real.sum()),
    }
    return total, facts


def answered(right: Tensor, part: Tensor) -> dict[str, tuple[int, int]]:
    """Per part: (answers without a wrong token, answers); an answer is a run of one part's tokens in a row."""
    counts: dict[str, tuple[int, int]] = {}
    for row_right, row_part in zip(right.tolist(), part.tolist(), strict=True):
        previous, good = -1, True
        for ok, p in [*zip(row_right, row_part, strict=True), (True, -1)]:
            if previous >= 0 and p != previous:
                correct, count = counts.get(PARTS[previous], (0, 0))
                counts[PARTS[previous]] = (correct + good, count + 1)
                good = True
            if p >= 0:
                good = (good if p == previous else True) and ok
            previous = p
    return counts


def balance(model: TinyModel, load: Tensor) -> float:
    """Move the routers' biases towards equal load (auxiliary-loss-free); returns max / mean of the fullest layer."""
    moes = [m for m in model.modules() if isinstance(m, MoE)]
    for moe, counts in zip(moes, load.float(), strict=True):
        moe.gate.e_score_correction_bias += BIAS_STEP * torch.sign(counts.mean() - counts)
    return float((load.float().amax(-1) / load.float().mean(-1)).max())


def average_gradients(model: TinyModel, world: int) -> None:
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world
    for p, part in zip(model.parameters(), flat.split([g.numel() for g in gradients]), strict=True):
        p.grad = part.view_as(p)


def train(rank: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    dist.init_process_group(
        "gloo", init_method=f"file://{args.output}/rendezvous", rank=rank, world_size=args.processes
    )
    model = TinyModel()
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.98), fused=True)
    indexer = {id(p) for name, p in model.named_parameters() if ".indexer." in name}
    levels, first, seconds = Levels(), 0, 0.0
    saved = Path(args.output) / "state.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        levels.level.update(state["level"])
        levels.accuracy.update(state["accuracy"])
        first, seconds = state["step"], state["seconds"]
    begin = time.monotonic() - seconds
    sums: dict[str, list[float]] = defaultdict(list)
    right: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for step in range(first, args.steps):
        progress = step / args.steps
        mode = phase(progress)
        total, facts = losses(model, batch_of(step, args, rank, levels, progress), mode, 0.3 if progress < 0.7 else 0.1)
        optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        average_gradients(model, args.processes)
        if mode == "warmup":  # the indexer alone; others keep their values and their moments
            for p in model.parameters():
                if id(p) not in indexer:
                    p.grad = None
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps)
        optimizer.step()

        gathered: list[Any] = [None] * args.processes
        dist.all_gather_object(gathered, facts)
        if mode != "warmup" and progress < BIAS_FROZEN:
            sums["balance"].append(balance(model, sum(f["load"] for f in gathered)))
        step_right: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
        for f in gathered:
            for part, (correct, count) in f["right"].items():
                step_right[part] = (step_right[part][0] + correct, step_right[part][1] + count)
                right[part][0] += correct
                right[part][1] += count
            for name in ("loss", "loss_mtp", "index_kl", "mtp_acceptance", "tokens"):
                if f[name] is not None:
                    sums[name].append(f[name])
        levels.update(step_right)

        done = step + 1
        if rank == 0 and (done % REPORT_EVERY == 0 or done == args.steps):
            report(args, done, mode, time.monotonic() - begin, sums, right, levels)
        if done % REPORT_EVERY == 0:
            sums.clear()
            right.clear()
        if rank == 0 and (done % SAVE_EVERY == 0 or done == args.steps):
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "level": dict(levels.level),
                "accuracy": dict(levels.accuracy),
                "step": done,
                "seconds": time.monotonic() - begin,
            }
            torch.save(state, f"{saved}.new")
            os.replace(f"{saved}.new", saved)
    dist.barrier()
    dist.destroy_process_group()


def report(
    args: argparse.Namespace,
    step: int,
    mode: Mode,
    seconds: float,
    sums: dict[str, list[float]],
    right: dict[str, list[int]],
    levels: Levels,
) -> None:
    """One line on the terminal and one in log.jsonl."""
    mean = {name: sum(values) / len(values) for name, values in sums.items() if name != "tokens"}
    tokens = sum(sums["tokens"])
    accuracy = {part: correct / count for part, (correct, count) in sorted(right.items()) if count}
    line = {"step": step, "mode": mode, "seconds": round(seconds, 1), "tokens": tokens, **mean, "accuracy": accuracy}
    line["level"] = {task: round(level, 2) for task, level in levels.level.items()}
    with (Path(args.output) / "log.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")
    shown = " ".join(f"{part} {100 * a:.0f}%@{levels(part.partition('/')[0]):.1f}" for part, a in accuracy.items())
    numbers = " ".join(f"{name} {value:.3f}" for name, value in mean.items() if not math.isnan(value))
    print(f"{step}/{args.steps} {mode} {seconds:.0f} s | {numbers} | {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="directory of the training state; an interrupted run goes on")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--tokens", type=int, default=3000, help="per process and step")
    parser.add_argument("--long-share", type=float, default=0.45, help="of steps that train on documents")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.output = str(Path(args.output).resolve())
    Path(args.output).mkdir(parents=True, exist_ok=True)
    (Path(args.output) / "rendezvous").unlink(missing_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    mp.spawn(train, args=(args,), nprocs=args.processes)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
