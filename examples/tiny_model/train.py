#!/usr/bin/env python3
"""Trains shoal-tiny from nothing: data-parallel processes with one thread each, resumable, on the CPU.

    python examples/tiny_model/train.py --output build/tiny-model

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
from model import CONFIG, Mode, MoE, TinyModel
from optimizer import Muon
from tasks import TASKS
from torch import Tensor

ADAMW_LR, ROUTER_LR, MUON_LR = 2e-3, 3e-4, 0.008
WEIGHT_DECAY, WARMUP_STEPS = 0.05, 50
FINAL_LR = 0.05
"""As a fraction of the highest one."""
WARMUP_PHASE, SPARSE_PHASE = 0.58, 0.63
"""Where the phases begin, as fractions of the steps."""
MTP_EVERY, MTP_WEIGHT = 3, 0.3
MTP_PREFIX = f"layers.{CONFIG['num_hidden_layers']}."
BIAS_STEP, BIAS_FROZEN = 0.01, 0.9
LEVEL_STEP, LEVEL_ACCURACY = 0.01, 0.8
MIN_NEED = 0.2
LOAD_DECAY = 0.9
REPORT_EVERY, SAVE_EVERY = 20, 200


class Levels:
    """The size of each task's questions, 0 to 1: it grows while those asked are answered."""

    def __init__(self) -> None:
        self.level: dict[str, float] = defaultdict(float)
        self.accuracy: dict[str, float] = defaultdict(float)

    def __call__(self, task: str) -> float:
        return self.level[task]

    def need(self, task: str) -> float:
        """From MIN_NEED for a task that is mastered at full size to 1 for one that has not begun."""
        best = max(self.accuracy[f"{task}/{mode}"] for mode in ("thinking", "direct"))
        return max(MIN_NEED, 1 - self.level[task] * best**4)

    def update(self, right: dict[str, tuple[int, int]]) -> None:
        """`right`: part -> (rows answered without a wrong token, rows)."""
        for part, (correct, count) in right.items():
            if not count:
                continue
            self.accuracy[part] = 0.9 * self.accuracy[part] + 0.1 * correct / count
        for task in TASKS:
            if max(self.accuracy[f"{task}/{mode}"] for mode in ("thinking", "direct")) > LEVEL_ACCURACY:
                self.level[task] = min(1.0, self.level[task] + LEVEL_STEP)


def phase(progress: float) -> Mode:
    return "dense" if progress < WARMUP_PHASE else "warmup" if progress < SPARSE_PHASE else "sparse"


def learning_rate(step: int, progress: float) -> float:
    """As a fraction of the highest one: it falls from the start, as steps are small and noisy, and to the end."""
    return min((step + 1) / WARMUP_STEPS, 1 / (1 + 3 * progress), FINAL_LR + (1 - FINAL_LR) * (1 - progress))


def batches_of(step: int, args: argparse.Namespace, rank: int, levels: Levels, progress: float) -> list[list[Encoded]]:
    """Short questions, and long rows; every rank has its own, of the same length, so that none waits for the other."""
    shared, own = random.Random(f"{args.seed}/{step}"), random.Random(f"{args.seed}/{step}/{rank}")
    if shared.random() >= levels.need("lookup"):
        return [short_batch(own, levels, levels.need, args.tokens + args.long_tokens)]
    length = shared.randint(128, 128 + round(960 * levels("lookup")))
    recall = shared.random() < max(0.1, 0.8 - 2 * progress)
    long = long_batch(own, levels, max(args.long_tokens, length), length, recall=recall)
    return [short_batch(own, levels, levels.need, args.tokens), long]


def losses(model: TinyModel, rows: list[Encoded], mode: Mode, *, mtp: bool) -> tuple[Tensor, dict[str, Any]]:
    tokens, part = collate(rows)
    real = tokens != PAD
    embedded, hidden, extras = model(tokens, real, mode)
    # position i predicts token i + 1, the MTP layer token i + 2
    learnt, target = part[:, 1:] >= 0, tokens[:, 1:]
    logits = model.lm_head(hidden[:, :-1][learnt])
    total = loss = F.cross_entropy(logits, target[learnt])
    right = torch.zeros(target.shape, dtype=torch.bool)
    right[learnt] = logits.argmax(-1) == target[learnt]
    facts: dict[str, Any] = {
        "loss": loss.item(),
        "right": answered(right, part[:, 1:]),
        "tokens": int(real.sum()),
    }
    if mtp:
        hidden_mtp = model.predict_after_next(embedded, hidden, real, mode, extras)
        learnt_mtp = part[:, 2:] >= 0
        logits_mtp, target_mtp = model.lm_head(hidden_mtp[:, :-2][learnt_mtp]), tokens[:, 2:][learnt_mtp]
        loss_mtp = F.cross_entropy(logits_mtp, target_mtp)
        total = total + MTP_WEIGHT * loss_mtp
        facts["loss_mtp"] = loss_mtp.item()
        facts["mtp_acceptance"] = (logits_mtp.argmax(-1) == target_mtp).float().mean().item()
    if extras.index_kl:
        index_kl = torch.stack(extras.index_kl).mean()
        index_loss = index_kl + torch.stack(extras.index_floor).mean()
        total = index_loss if mode == "warmup" else total + index_loss
        facts["index_kl"] = index_kl.item()
        facts["index_floor"] = index_loss.item() - index_kl.item()
    facts["load"] = extras.expert_load
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


class Balancer:
    """Moves the routers' biases towards equal load (auxiliary-loss-free balancing).

    Short questions and long rows count the same, whatever their share of the training is: both are to be balanced.
    """

    def __init__(self, model: TinyModel) -> None:
        self.gates = [m.gate for m in model.modules() if isinstance(m, MoE)]
        self.shares = torch.zeros(2, len(self.gates), CONFIG["n_routed_experts"])
        """Running means, by kind of row: the part of a layer's tokens that each expert gets."""

    def update(self, loads: list[list[list[Tensor]]], *, frozen: bool) -> float:
        """`loads`: of each rank, of its short and (where it had any) its long rows, the tokens of each expert by layer;
        the MTP layer's only where it ran. Returns max / mean of the fullest layer."""
        for kind in range(len(loads[0])):
            for layer, counts in enumerate(zip(*(of_rank[kind] for of_rank in loads), strict=True)):
                total = sum(counts).float()
                self.shares[kind, layer].lerp_(total / total.sum(), 1 - LOAD_DECAY)
        load = self.shares.sum(dim=0)
        relative = load / load.mean(dim=-1, keepdim=True).clamp_min(1e-9)
        if not frozen:
            for gate, of_layer in zip(self.gates, relative, strict=True):
                gate.e_score_correction_bias += BIAS_STEP * (1 - of_layer).clamp(-1, 1) * bool(of_layer.any())
        return float(relative.max())


def is_trained(name: str, mode: Mode, *, mtp: bool) -> bool:
    """Whether a step in this mode changes the parameter: the same on every rank, whatever its rows were."""
    if ".indexer." in name:
        return mode != "dense" and (mtp or not name.startswith(MTP_PREFIX))
    return mode != "warmup" and (mtp or not name.startswith(MTP_PREFIX))


def average_gradients(parameters: list[torch.nn.Parameter], world: int) -> None:
    """Over the ranks; what a rank had no use for counts as zero."""
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world
    for p, part in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
        p.grad = part.view_as(p)


def train(rank: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    dist.init_process_group(
        "gloo", init_method=f"file://{args.output}/rendezvous", rank=rank, world_size=args.processes
    )
    model = TinyModel()
    matrices = [
        p
        for name, p in model.named_parameters()
        if name.startswith("layers.") and p.dim() >= 2 and not name.endswith("gate.weight")
    ]
    routers = [m.gate.weight for m in model.modules() if isinstance(m, MoE)]
    others = [p for p in model.parameters() if not any(p is m for m in [*matrices, *routers])]
    muon = Muon(matrices, momentum=0.95, weight_decay=WEIGHT_DECAY, rank=rank, world=args.processes)
    groups = [{"params": others, "peak": ADAMW_LR}, {"params": routers, "peak": ROUTER_LR}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    levels, balancer, step, seconds = Levels(), Balancer(model), 0, 0.0
    saved = Path(args.output) / "state.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        muon.load_state(state["muon"])
        adamw.load_state_dict(state["adamw"])
        levels.level.update(state["level"])
        levels.accuracy.update(state["accuracy"])
        balancer.shares = state["shares"]
        step, seconds = state["step"], state["seconds"]
    begin = time.monotonic() - seconds
    sums: dict[str, list[float]] = defaultdict(list)
    right: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    while step < args.until:
        # what is drawn depends on the step alone, so that an interrupted training goes on as if it had not been
        torch.manual_seed((args.seed * 1_000_000 + step) * args.processes + rank)
        progress = step / args.steps
        mode = phase(progress)
        mtp = step % MTP_EVERY == 0
        model.zero_grad(set_to_none=True)
        facts = []
        for rows in batches_of(step, args, rank, levels, progress):
            total, of_rows = losses(model, rows, mode, mtp=mtp)
            total.backward()  # type: ignore[no-untyped-call]
            facts.append(of_rows)
        trained = []
        for name, p in model.named_parameters():
            if is_trained(name, mode, mtp=mtp):
                trained.append(p)
            else:
                p.grad = None
        average_gradients(trained, args.processes)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        rate = learning_rate(step, progress)
        muon.step(MUON_LR * rate)
        for group in adamw.param_groups:
            group["lr"] = group["peak"] * rate
        adamw.step()

        by_rank: list[Any] = [None] * args.processes
        dist.all_gather_object(by_rank, facts)
        gathered = [of_rows for facts in by_rank for of_rows in facts]
        loads = [[of_rows["load"] for of_rows in facts] for facts in by_rank]
        sums["balance"].append(balancer.update(loads, frozen=mode == "warmup" or progress >= BIAS_FROZEN))
        step_right: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
        for f in gathered:
            for part, (correct, count) in f["right"].items():
                step_right[part] = (step_right[part][0] + correct, step_right[part][1] + count)
                right[part][0] += correct
                right[part][1] += count
            for name in ("loss", "loss_mtp", "index_kl", "index_floor", "mtp_acceptance", "tokens"):
                if name in f:
                    sums[name].append(f[name])
        levels.update(step_right)

        step += 1
        if rank == 0 and step % REPORT_EVERY == 0:
            report(args, step, mode, time.monotonic() - begin, sums, right, levels)
        if step % REPORT_EVERY == 0:
            sums.clear()
            right.clear()
        if step % SAVE_EVERY == 0 or step == args.until:
            state = {
                "model": model.state_dict(),
                "muon": muon.gathered_state(),
                "adamw": adamw.state_dict(),
                "level": dict(levels.level),
                "accuracy": dict(levels.accuracy),
                "shares": balancer.shares,
                "step": step,
                "seconds": time.monotonic() - begin,
            }
            if rank == 0:
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
    print(f"{step} {mode} {seconds:.0f} s | {numbers} | {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="directory of the training state; an interrupted run goes on")
    parser.add_argument("--steps", type=int, default=4400, help="of the whole training, which its phases are parts of")
    parser.add_argument("--until", type=int, help="stop at this step; the same command without it goes on from there")
    parser.add_argument("--tokens", type=int, default=1200, help="of short questions, per process and step")
    parser.add_argument("--long-tokens", type=int, default=1100, help="of documents, per process and step")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.until = min(args.steps, args.until or args.steps)
    args.output = str(Path(args.output).resolve())
    Path(args.output).mkdir(parents=True, exist_ok=True)
    (Path(args.output) / "rendezvous").unlink(missing_ok=True)
    # one thread each; freed memory is kept, as giving it back and zeroing it anew costs a tenth of the time
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "1000000000",
        "MALLOC_TRIM_THRESHOLD_": "8000000000",
    }
    mp.spawn(train, args=(args,), nprocs=args.processes)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
