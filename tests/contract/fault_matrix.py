"""Every fault in every role, and random ones, on a real local Ray; docs/ and benchmarks/results/ tell what happened.

    python -m tests.contract.fault_matrix matrix     docs/faults.md, benchmarks/results/faults.json
    python -m tests.contract.fault_matrix chaos 200  benchmarks/results/chaos.json; a third argument is the first seed

Every run is judged by `tests/support/faults.py`: an exception ends the program.
"""

from __future__ import annotations

import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from shoal.cluster.supervision.fault import Fault
from shoal.cluster.workers.local_cluster import local_cluster
from shoal.parallel.failpoints import VARIABLE
from shoal.runtime.random_checkpoint import make_checkpoint
from shoal.runtime.tokenization.byte_tokenizer import write_byte_tokenizer
from tests.support.faults import Bits, Rig, Target, answers_of_one_process, make_model, rig

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "faults.md"

LOOP = ("worker.take_in", "engine.schedule", "engine.run", "worker.hand_out")
LEADER = (*LOOP, "engine.sample", "engine.update")
PLACES: dict[str, tuple[int, int]] = {"prefill": (0, 0), "decode": (1, 0), "leader": (0, 0), "follower": (0, 1)}
CASES: dict[str, tuple[str, ...]] = {
    "prefill": (*LEADER, "kv.publish"),
    "decode": (*LEADER, "kv.fetch", "kv.write"),
    "leader": (*LEADER, "collective"),
    "follower": (*LOOP, "collective"),
}
NTH = {"prefill": 4, "decode": 12, "leader": 9, "follower": 9}
"""When a point is in the middle of the work."""
NUM_REPEATED = 15
"""Kills of a decode worker whose median is given."""

SPLIT: dict[str, Any] = {"replicas": ["prefill:1", "decode:1"], "kv_transport": "nixl", "heartbeat_timeout_s": 2.0}
RANKS: dict[str, Any] = {"tensor_parallel_size": 2, "data_parallel_size": 2, "heartbeat_timeout_s": 2.0}
SEVERAL: dict[str, Any] = {
    "replicas": ["prefill:2", "decode:1:dp=2"],
    "kv_transport": "nixl",
    "heartbeat_timeout_s": 2.0,
}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the matrix."""

    role: str
    fault: str
    outcome: str
    detection_s: float | None
    formed_s: float | None
    first_token_s: float | None

    @classmethod
    def of(cls, role: str, what: str, faults: Sequence[Fault]) -> Row:
        """Row of the last loss of a rank, which is the one that everything waited for."""
        assert faults, f"{role}, {what}: the fault did not happen"
        last = [fault for fault in faults if fault.rank is not None][-1]
        return cls(role, what, "same bits, once each", last.detection_s, last.formed_s, last.first_token_s)


def matrix(model: str, expected: list[Bits]) -> tuple[list[Row], dict[str, Any]]:
    rows: list[Row] = []
    repeated: list[Fault] = []
    with rig(model, expected, **SPLIT) as cluster:
        rows += _single(cluster, ("prefill", "decode"))
        both = [Target(*PLACES["prefill"], "kv.publish", 4), Target(*PLACES["decode"], "engine.update", 6)]
        rows.append(Row.of("prefill and decode", "kill at once, one spare", cluster.run(lambda: cluster.arm(both))))
        for _ in range(NUM_REPEATED):
            repeated += cluster.run(lambda: cluster.arm([Target(*PLACES["decode"], "engine.run", 12)]))
    with rig(model, expected, **RANKS) as cluster:
        rows += _single(cluster, ("leader", "follower"))
        two = [Target(0, 0, "engine.run", 9), Target(0, 3, "engine.run", 9)]
        rows.append(Row.of("leader and follower", "kill at once, one spare", cluster.run(lambda: cluster.arm(two))))
    with rig(model, expected, spares=2, **SPLIT) as cluster:
        for point in ("worker.build", "worker.join", "engine.run"):
            first = [Target(*PLACES["decode"], "engine.run", 12)]
            faults = cluster.run(partial(cluster.arm, first, f"{{}}:{point}:1"))
            rows.append(Row.of("decode, then its replacement", f"kill at engine.run, then at {point}", faults))
    with local_cluster(num_nodes=3, num_cpus=1), rig(model, expected, **SPLIT) as cluster:
        target = Target(*PLACES["decode"], "engine.run", 12, "node")
        faults = cluster.run(lambda: cluster.arm([target]), then=lambda: setattr(cluster, "num_spares", 0))
        rows.append(Row.of("node of a decode worker", "loses power at engine.run", faults))
    rows += _driver()
    return rows, _median(repeated)


def _single(cluster: Rig, roles: Sequence[str]) -> Iterator[Row]:
    for role in roles:
        for action in ("kill", "stop"):
            for point in CASES[role]:
                target = Target(*PLACES[role], point, NTH[role], action)
                faults = cluster.run(partial(cluster.arm, [target]))
                print(role, action, point, [f.to_dict() for f in faults], flush=True)
                yield Row.of(role, f"{action} at {point}", faults)


def _median(faults: Sequence[Fault]) -> dict[str, Any]:
    """Median times of kills of a decode worker while a spare waits."""
    values = {
        name: [v for f in faults if (v := getattr(f, name)) is not None]
        for name in ("detection_s", "formed_s", "first_token_s")
    }
    return {name: {"median": median(v), "min": min(v), "max": max(v), "n": len(v)} for name, v in values.items()}


# -- the process that drives a job -----------------------------------------------------------------------------------


def _driver() -> Iterator[Row]:
    """`shoal batch` killed at each of its points, and the same command again."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        make_checkpoint(path / "model", "deepseek_v32", seed=41, overrides={"vocab_size": 272})
        write_byte_tokenizer(path / "model" / "tokenizer.json")
        lines = [{"prompt": f"row {i}", "max_tokens": 60, "ignore_eos": True, "seed": i} for i in range(24)]
        (path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        undisturbed, _ = _batch(path, "undisturbed", "")
        for point, nth in (("job.submit", 1), ("job.answer", 2), ("job.commit", 2), ("job.finish", 1)):
            killed, _ = _batch(path, point, f"driver:0:{point}:{nth}")
            assert killed.returncode == -signal.SIGKILL, killed.stderr
            again, seconds = _batch(path, point, "")
            assert again.returncode == 0, again.stderr
            assert again.stdout.splitlines()[-1] == undisturbed.stdout.splitlines()[-1]
            ids = [json.loads(line)["id"] for line in (path / point / "part-00000.jsonl").open()]
            assert sorted(ids) == sorted(f"batch_req_{i}" for i in range(len(lines)))
            ready = re.search(r"ready ([0-9.]+) s", again.stderr)
            print("driver", point, f"{seconds:.1f} s in all", flush=True)
            yield Row(
                "driver",
                f"kill at {point}, same command again",
                "same digest, once each",
                None,
                None if ready is None else float(ready[1]),
                None,
            )


def _batch(path: Path, output: str, faults: str) -> tuple[subprocess.CompletedProcess[str], float]:
    command = [sys.executable, "-m", "shoal", "batch", str(path / "rows.jsonl"), "--model", str(path / "model")]
    layout = ["--output", str(path / output), "--replicas", "prefill:1", "--replicas", "decode:1"]
    start = time.monotonic()
    done = subprocess.run(
        [*command, *layout, "--num-threads-per-worker", "1"],
        capture_output=True,
        text=True,
        env={**os.environ, VARIABLE: faults},
        timeout=300,
    )
    return done, time.monotonic() - start


# -- random faults ---------------------------------------------------------------------------------------------------


def chaos(cluster: Rig, roles: Mapping[tuple[int, int], str], rng: random.Random) -> list[Fault]:
    """Up to three ranks that are killed or frozen at random points, and spares that may die in their places."""
    places = rng.sample(sorted(roles), rng.randint(1, min(3, len(roles))))
    targets = [
        Target(*place, rng.choice(CASES[roles[place]]), rng.randint(1, 12), rng.choices(["kill", "stop"], [5, 1])[0])
        for place in places
    ]
    dying = f"{{}}:{rng.choice([*LOOP, 'worker.build', 'worker.join'])}:{rng.randint(1, 5)}"
    return cluster.run(lambda: cluster.arm(targets, dying if rng.random() < 0.3 else ""))


def run_chaos(model: str, expected: list[Bits], num_runs: int, first_seed: int) -> dict[str, Any]:
    runs: list[dict[str, Any]] = []
    ranks = {(0, rank): ("leader", "follower")[rank % 2] for rank in range(4)}
    several = {(0, 0): "prefill", (1, 0): "prefill", (2, 0): "decode", (2, 1): "decode"}
    layouts = ((ranks, RANKS), (several, SEVERAL))
    for number, (roles, layout) in enumerate(layouts):
        with rig(model, expected, **layout) as cluster:
            for seed in range(first_seed + number, first_seed + num_runs, len(layouts)):
                start = time.monotonic()
                faults = chaos(cluster, roles, random.Random(seed))
                runs.append(
                    {
                        "seed": seed,
                        "layout": layout,
                        "seconds": round(time.monotonic() - start, 2),
                        "faults": [f.to_dict() for f in faults],
                    }
                )
                lost = [(f.worker, f.rank, f.point or f.reason) for f in faults]
                print(seed, runs[-1]["seconds"], lost, flush=True)
    return {"runs": len(runs), "faults": sum(len(r["faults"]) for r in runs), "exceptions": 0, "of": runs}


# -- reports ---------------------------------------------------------------------------------------------------------


def document(rows: Sequence[Row], repeated: dict[str, Any]) -> str:
    def ms(value: float | None) -> str:
        return "" if value is None else f"{1000 * value:.0f}"

    kills = {name: {k: ms(v) for k, v in values.items()} for name, values in repeated.items()}
    summary = (
        f"A decode worker killed while a spare waits, {repeated['formed_s']['n']} times (medians): noticed after "
        f"{kills['detection_s']['median']} ms, the group after {kills['formed_s']['median']} ms (at most "
        f"{kills['formed_s']['max']}), the first new token after {kills['first_token_s']['median']} ms (at most "
        f"{kills['first_token_s']['max']})."
    )
    lines = [
        "# What happens when something fails",
        "",
        "Made by `python -m tests.contract.fault_matrix matrix`, which runs every line on a real local Ray: a process",
        "is killed (SIGKILL) or frozen (SIGSTOP; it counts as lost after the heartbeat timeout, 2 s here) when it",
        "reaches a failpoint in the middle of the work. After each run all answers are compared bit for bit with",
        "those of one undisturbed process, every request must be answered exactly once, and every rank must have",
        "given back all its blocks. Times are milliseconds: from the fault until it was noticed, and from then until",
        "all ranks of the replica were in one group again and until an interrupted row had a new token. For the",
        "driver, the group is what the same command took to be ready again.",
        "",
        summary,
        "",
        "| role | fault | outcome | noticed | group | first token |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = " | ".join(ms(t) for t in (row.detection_s, row.formed_s, row.first_token_s))
        lines.append(f"| {row.role} | {row.fault} | {row.outcome} | {times} |")
    return "\n".join(lines) + "\n"


def write(name: str, value: dict[str, Any]) -> None:
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "command": " ".join(sys.argv[1:])}
    (RESULTS / name).write_text(json.dumps(machine | value, indent=1) + "\n")


@contextmanager
def judged_model() -> Iterator[tuple[str, list[Bits]]]:
    with tempfile.TemporaryDirectory() as directory:
        model = make_model(Path(directory) / "model")
        yield model, answers_of_one_process(model)


def main() -> None:
    with judged_model() as (model, expected):
        if sys.argv[1] == "matrix":
            rows, repeated = matrix(model, expected)
            DOCUMENT.write_text(document(rows, repeated))
            values = [{name: getattr(row, name) for name in Row.__slots__} for row in rows]
            write("faults.json", {"decode_kill_with_spare": repeated, "rows": values})
        else:
            first_seed = int(sys.argv[3]) if len(sys.argv) > 3 else 0
            write("chaos.json", run_chaos(model, expected, int(sys.argv[2]), first_seed))


if __name__ == "__main__":
    main()
