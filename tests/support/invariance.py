"""The same rows through many layouts, schedules and histories: every token and log-probability has the same bits."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from torch.distributed import Store  # type: ignore[attr-defined]

from shoal.parallel.config import ParallelConfig
from shoal.parallel.groups import ParallelGroups, init_groups
from shoal.runtime.engine.build import build_engine
from shoal.runtime.engine.config import EngineConfig
from shoal.runtime.engine.engine import Engine
from shoal.runtime.random_checkpoint import make_checkpoint
from shoal.runtime.types import Logprob, Request, RequestOutput, SamplingParams
from tests.support.answers import Answers


@dataclass(frozen=True)
class Point:
    """One way to run the rows."""

    name: str
    tp: int = 1
    dp: int = 1
    replicas: int = 1
    engine: dict[str, Any] = field(default_factory=dict)
    order: str = "forward"
    """forward, reversed, or alone: one row at a time."""
    warm: bool = False
    """Run the rows twice on one engine; the second time finds its prompts in the prefix cache."""
    preempt_every: int = 0
    """Preempt the longest running sequence every that many steps."""
    resume_after: int = 0
    """After that many steps another engine goes on with the tokens that are there."""
    threads: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.dp


SCHEDULES: dict[str, dict[str, Any]] = {
    "one after another": {"order": "alone"},
    "all together": {},
    "reversed order": {"order": "reversed"},
    "chunks of 1": {"engine": {"max_chunk_size": 1}},
    "chunks of 7": {"engine": {"max_chunk_size": 7}},
    "chunks of 64": {"engine": {"max_chunk_size": 64, "max_num_batched_tokens": 512}},
    "budget of 5 tokens": {"engine": {"max_num_batched_tokens": 5}},
    "blocks of 1": {"engine": {"block_size": 1, "num_kv_blocks": 512}},
    "blocks of 64": {"engine": {"block_size": 64, "num_kv_blocks": 16}},
    "prefix cache off": {"engine": {"enable_prefix_caching": False}},
    "prefix cache warm": {"warm": True},
    "preempted every 3 steps": {"preempt_every": 3},
    "too few blocks": {"engine": {"num_kv_blocks": 16}},
    "resumed by another engine after 9 steps": {"resume_after": 9},
    "2 threads": {"threads": 2},
}

Rows = dict[int, tuple[Any, ...]]


def differing(rows: Rows, expected: Rows) -> list[int]:
    return [index for index in expected if rows.get(index) != expected[index]]


def dtypes(names: str) -> dict[str, Any]:
    """Engine settings of "float32", of "fp8" (weights in FP8) or of "float32, fp8 cache"."""
    dtype, _, cache = names.partition(", ")
    return {
        "dtype": "bfloat16" if dtype == "fp8" else dtype,
        "kv_cache_dtype": "fp8" if cache == "fp8 cache" else "auto",
    }


NO_QUERY_LATENT = "deepseek_v3 q_lora_rank=null"
"""Moonlight, GigaChat3-10B and Kanana-2."""


def make_model(directory: Path, name: str, dtype: str) -> Path:
    """A model of type `name`, or `NO_QUERY_LATENT`.

    Four heads, so that tp 4 divides them; `index_topk` is 8, so that every row but the shortest crosses it.
    """
    model_type = name.split()[0]
    overrides: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 4}
    if model_type == "glm_moe_dsa":
        overrides |= {"indexer_types": ["full", "shared", "full"], "num_hidden_layers": 3}
    if name == NO_QUERY_LATENT:
        overrides["q_lora_rank"] = None
    path = directory / f"{name}-{dtype}"
    torch_dtype = getattr(torch, dtypes(dtype)["dtype"])
    make_checkpoint(path, model_type, seed=11, dtype=torch_dtype, overrides=overrides, fp8=dtype == "fp8")
    return path


BASE_ENGINE = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "block_size": 8,
    "num_kv_blocks": 64,
    "max_model_len": 128,
}


def rows(vocab_size: int) -> list[Request]:
    """Prompts of many lengths, two of them with a common beginning, and every kind of sampling."""
    generator = torch.Generator().manual_seed(7)

    def prompt(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, vocab_size, (length,), generator=generator).tolist())

    shared = prompt(24)
    cases = [
        (prompt(1), SamplingParams(temperature=0.0, max_tokens=10, logprobs=4)),
        (prompt(5), SamplingParams(temperature=1.0, seed=5, max_tokens=12, logprobs=2)),
        (shared + prompt(3), SamplingParams(temperature=0.0, max_tokens=9, logprobs=1, prompt_logprobs=1)),
        (shared + prompt(14), SamplingParams(temperature=0.8, top_p=0.9, top_k=20, max_tokens=12, logprobs=0)),
        (prompt(33), SamplingParams(temperature=1.2, min_p=0.05, n=2, max_tokens=8, logprobs=1)),
        (
            prompt(61),
            SamplingParams(temperature=0.0, max_tokens=14, logprobs=0, presence_penalty=0.5, frequency_penalty=0.3),
        ),
        (
            prompt(70),
            SamplingParams(temperature=1.0, repetition_penalty=1.3, max_tokens=6, logprobs=0, ignore_eos=True),
        ),
    ]
    return [
        Request(request_id=str(i), prompt_token_ids=tokens, params=params, index=i)
        for i, (tokens, params) in enumerate(cases)
    ]


def bits(output: RequestOutput) -> tuple[Any, ...]:
    """Everything that the contract fixes about a row, floats as their bytes."""

    def logprob_bits(entries: Iterable[dict[int, Logprob] | None] | None) -> list[Any] | None:
        if entries is None:
            return None
        return [e and [(t, struct.pack("<d", p.logprob), p.rank) for t, p in e.items()] for e in entries]

    completions = [
        (o.index, tuple(o.token_ids), o.finish_reason, o.stop_reason, str(logprob_bits(o.logprobs)))
        for o in output.outputs
    ]
    return (*completions, str(logprob_bits(output.prompt_logprobs)))


def run_rows(engine: Engine, point: Point, requests: list[Request]) -> dict[int, tuple[Any, ...]]:
    """Drive one rank's engine until nobody in the replica has work; returns this rank's rows."""
    answers = Answers(requests)
    steps = 0
    while True:
        if point.preempt_every and engine.is_leader and steps % point.preempt_every == point.preempt_every - 1:
            running = engine.scheduler.running
            if running:
                engine.scheduler.preempt(max(running, key=lambda s: (s.num_tokens, s.seq_id)).seq_id)
        if requests and (point.order != "alone" or not engine.has_unfinished):
            batch = requests[:1] if point.order == "alone" else list(requests)
            del requests[: len(batch)]
            for request in batch:
                engine.add_request(request)
        result = engine.step()
        steps += 1
        assert steps < 5000, "the engine does not finish"
        answers.take(result.outputs)
        if result.idle and not requests:
            engine.block_manager.check_integrity()
            return _bits_of(answers)


def run_steps(
    engine: Engine, requests: list[Request], num_steps: int
) -> tuple[dict[int, tuple[Any, ...]], list[Request]]:
    """The rows that finish within so many steps, and the others with what they have by then."""
    answers = Answers(requests)
    for request in requests:
        engine.add_request(request)
    for _ in range(num_steps):
        answers.take([*engine.step().outputs, *engine.take_outputs()])
    unfinished = [request for request in requests if request.request_id not in answers.finished]
    resumed = [replace(r, generated=answers.responses[r.request_id].generated()) for r in unfinished]
    return _bits_of(answers), resumed


def _bits_of(answers: Answers) -> dict[int, tuple[Any, ...]]:
    return {int(name): bits(output) for name, output in answers.finished.items()}


def run_point(
    point: Point, model_dir: Path, dtype: str, groups: ParallelGroups, asked: Callable[[int], list[Request]] = rows
) -> dict[int, tuple[Any, ...]]:
    """This rank's rows of a point. asked: the requests for a model with a vocabulary of this size."""
    previous = torch.get_num_threads()
    torch.set_num_threads(point.threads)
    try:
        config = EngineConfig(**{**BASE_ENGINE, **dtypes(dtype), **point.engine})
        merged: dict[int, tuple[Any, ...]] = {}
        for replica in range(point.replicas):
            engine = build_engine(model_dir, config, groups)
            mine = [
                r
                for r in asked(engine.limits.vocab_size)
                if engine.is_leader
                and r.index % point.replicas == replica
                and r.index // point.replicas % point.dp == groups.dp_rank
            ]
            mine_count = len(mine)
            if point.resume_after:
                done, mine = run_steps(engine, mine, point.resume_after)
                merged |= done
                assert any(g.token_ids for r in mine for g in r.generated) or not mine_count, "nothing to go on with"
                engine = build_engine(model_dir, config, groups)
            if point.order == "reversed":
                mine.reverse()
            if point.warm:
                run_rows(engine, point, list(mine))
            merged |= run_rows(engine, point, mine)
            if point.preempt_every and engine.is_leader and mine_count:
                assert engine.scheduler.num_preemptions > 0, "nothing was preempted"
            if point.warm and config.enable_prefix_caching and engine.is_leader:
                assert engine.scheduler.prefix_cache_hits > 0 or not mine_count, "the second pass found nothing"
        return merged
    finally:
        torch.set_num_threads(previous)


def run_points_on_rank(
    rank: int,
    store: Store,
    models: list[tuple[Path, str]],
    points: list[Point],
    device: str = "cpu",
    asked: Callable[[int], list[Request]] = rows,
) -> list[list[dict[int, tuple[Any, ...]]]]:
    """This rank's rows of every point, for every (model, dtype); a rank that a point has no use for skips it."""
    results = []
    for index, (model_dir, dtype) in enumerate(models):
        of_model: list[dict[int, tuple[Any, ...]]] = []
        for number, point in enumerate(points):
            if rank >= point.world_size:
                of_model.append({})
                continue
            layout = ParallelConfig(tensor_parallel_size=point.tp, data_parallel_size=point.dp)
            epoch = index * len(points) + number
            groups = init_groups(layout, rank, store, epoch=epoch, device=torch.device(device), timeout_s=600.0)
            of_model.append(run_point(point, model_dir, dtype, groups, asked))
        results.append(of_model)
    return results
