"""One run: a job whose drivers and workers die until it is finished. Everything in it follows from its seed."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from random import Random

from shoal.cluster.jobs import journal as journal_module
from shoal.cluster.replica_spec import ReplicaSpec, Role
from shoal.cluster.replicas.replica_pool import ReplicaPool

from .cluster import Cluster, Layout, installed, replaced
from .engine import EngineSettings
from .faults import Plan
from .job import Job
from .model import Row, random_rows
from .oracle import check_run
from .transport import Weather
from .virtual import DriverKilled, World

MAX_LIVES = 4
MAX_PROMPT, MAX_TOKENS = 8, 6
SETTLE_S = 40.0
"""Settling time of a world without requests: longer than the lease of published KV, and than a restart."""

LAYOUTS: list[list[tuple[Role, int, int]]] = [
    [("mixed", 1, 1)],
    [("mixed", 1, 2)],
    [("mixed", 2, 1)],
    [("mixed", 2, 2)],
    [("mixed", 1, 1), ("mixed", 1, 1)],
    [("prefill", 1, 1), ("decode", 1, 1)],
    [("prefill", 1, 1), ("decode", 1, 1)],
    [("prefill", 1, 1), ("decode", 1, 2)],
    [("prefill", 2, 1), ("decode", 1, 1)],
    [("prefill", 1, 2), ("decode", 2, 1)],
    [("prefill", 1, 1), ("prefill", 1, 1), ("decode", 1, 1)],
    [("prefill", 1, 1), ("decode", 1, 1), ("decode", 1, 1)],
    [("prefill", 1, 1), ("mixed", 1, 1)],
]
"""Role, tensor parallel size and data parallel size of each replica."""


@dataclass
class Outcome:
    """What happened in a run that ended well."""

    num_lives: int = 0
    num_losses: int = 0
    num_replays: int = 0
    num_failed_transfers: int = 0
    num_events: int = 0


def run(seed: int) -> Outcome:
    """AssertionError, naming the seed, when something is wrong."""
    try:
        return _run(Random(seed))
    except Exception as error:
        raise AssertionError(f"seed {seed}: {error!r}") from error


def _run(rng: Random) -> Outcome:
    rows = random_rows(rng, rng.randint(2, 4), max_prompt=MAX_PROMPT, max_tokens=MAX_TOKENS)
    layout = random_layout(rng)
    job = Job(rows, rng)
    outcome = Outcome()
    for life in range(MAX_LIVES):
        outcome.num_lives += 1
        is_last = life == MAX_LIVES - 1
        if _live(job, rows, layout, rng, outcome, is_last=is_last):
            break
    job.file.writes_left = None
    with replaced(journal_module, os=job.file):
        ledger = job.open().ledger
    check_run(ledger, None, [])
    return outcome


def _live(job: Job, rows: dict[str, Row], layout: Layout, rng: Random, outcome: Outcome, *, is_last: bool) -> bool:
    """One driver; whether it finished the job."""
    kill_driver = not is_last and rng.random() < 0.4
    num_faults = rng.choice([0, 1, 1, 2, 3])
    world = World(Random(rng.random()))
    plan = Plan(rng, num_faults=0 if is_last else num_faults, kill_driver=kill_driver)
    cluster = Cluster(world, layout, rows, plan)
    job.file.writes_left = rng.randint(0, 8) if kill_driver and rng.random() < 0.5 else None
    job.file.is_full = rng.random() < 0.5
    with installed(cluster), replaced(journal_module, os=job.file):
        try:
            job_run = job.open()
            pool = cluster.start()
            job_run.answer(world, pool)
            settle(cluster, pool)
        except DriverKilled:
            return False
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return False
        finally:
            outcome.num_events += world.num_events
        engines = [p.engine for p in cluster.members if p.engine is not None]
        check_run(job_run.ledger, pool._routing, engines)
        # The KV cache entries of a row that ends with its first token go at once.
        is_short = any(all(len(a.output) <= 1 for a in row.answers) for row in rows.values())
        if plan.is_empty and layout.weather.is_fair and not is_short:
            assert pool._routing.num_failed_transfers == 0, "KV cache entries were not there in time"
    outcome.num_losses += len(pool.faults)
    outcome.num_replays += pool._routing.num_replays
    outcome.num_failed_transfers += pool._routing.num_failed_transfers
    return True


def settle(cluster: Cluster, pool: ReplicaPool) -> None:
    """Until nobody holds anything, or for as long as the slowest mending takes."""
    end = cluster.world.now + SETTLE_S
    while cluster.world.now < end:
        cluster.world.pass_time(0.1)
        outputs = pool.poll(0.0)
        assert not outputs, f"answers that nobody asked for: {outputs}"
        if pool.supervisor.is_whole(0) and not any(p.engine.audit() for p in cluster.members if p.engine):
            return


def random_layout(rng: Random) -> Layout:
    replicas = []
    for role, tp, dp in rng.choice(LAYOUTS):
        block_size = rng.choice([1, 2, 3, 4])
        needed = -(-(MAX_PROMPT + MAX_TOKENS) // block_size)
        settings = EngineSettings(
            num_blocks=needed + rng.choice([0, 1, needed, 3 * needed]),
            block_size=block_size,
            max_num_seqs=rng.choice([2, 4]),
            max_num_batched_tokens=rng.choice([3, 5, 16]),
            max_chunk_size=rng.choice([None, 2, 3]),
            max_transfer_tokens=rng.choice([4, 64]),
            enable_prefix_caching=rng.random() < 0.7,
            max_model_len=MAX_PROMPT + MAX_TOKENS,
        )
        replicas.append((ReplicaSpec(role=role, tensor_parallel_size=tp, data_parallel_size=dp), settings))
    weather = Weather()
    if rng.random() < 0.4:
        weather = Weather(
            lost=rng.choice([0.0, 0.1]),
            repeated=rng.choice([0.0, 0.2]),
            late=rng.choice([0.0, 0.2]),
            spoiled=rng.choice([0.0, 0.3]),
            stale=rng.choice([0.0, 0.5]),
        )
    return Layout(replicas, rng.choice([0, 0, 1]), weather, rng.choice([0.1, 0.3, 1.0]))
