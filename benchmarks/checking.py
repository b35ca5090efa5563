#!/usr/bin/env python3
"""Rows per second that `shoal batch` checks and tokenises before the engines start: no engine is needed.

    PYTHONPATH=.src python benchmarks/checking.py --output benchmarks/results/checking.json

Short conversations for shoal-tiny as JSON lines, as Zstandard and as Parquet, by different numbers of processes, in
turns; the spool and the index of ids are written as in a job. `read` is what reading the lines alone takes: the limit
of one process that gives the rows to others.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from shoal.cluster.bundled import BUNDLED_MODEL
from shoal.cluster.engine_args import EngineArgs
from shoal.cluster.jobs.choose_checker import choose_checker
from shoal.cluster.jobs.config import InputArgs
from shoal.cluster.jobs.input.custom_ids import CustomIdIndex
from shoal.cluster.jobs.input.files import find_files
from shoal.cluster.jobs.input.rows import JobInput
from shoal.cluster.jobs.spool import RowSpoolWriter
from shoal.cluster.jobs.validation import validate_input
from shoal.cluster.prompts import request_defaults

ENGINE = EngineArgs(model=str(BUNDLED_MODEL))


def conversation(number: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"What is {4821 + number} + {7790 + 11 * number}?"}]
    return {"custom_id": f"row-{number}", "messages": messages, "sampling_params": {"max_tokens": 64}}


def write_inputs(directory: Path, num_rows: int) -> dict[str, Path]:
    """The same rows in every format."""
    lines = directory / "in.jsonl"
    with lines.open("w") as file:
        for number in range(num_rows):
            file.write(json.dumps(conversation(number)) + "\n")
    compressed = directory / "in.jsonl.zst"
    compressed.write_bytes(zstandard.compress(lines.read_bytes()))
    table = directory / "in.parquet"
    pq.write_table(pa.Table.from_pylist([conversation(number) for number in range(num_rows)]), table)
    return {"jsonl": lines, "zst": compressed, "parquet": table}


def check(path: Path, num_processes: int, directory: Path) -> int:
    """Check a file as a job does; returns the number of rows."""
    rules = request_defaults(ENGINE, {}, None)
    job_input = JobInput(files=find_files([str(path)]))
    args = InputArgs(num_check_processes=num_processes)
    checker = choose_checker(args, ENGINE, job_input.files, limits=rules.limits, sampling={}, thinking=None)
    ids = CustomIdIndex(directory / "ids.sqlite")
    spool = RowSpoolWriter(directory / "rows.spool")
    try:
        summary = validate_input(
            job_input,
            rules,
            ids,
            on_good_row=spool.add,
            on_bad_row=lambda *_: sys.exit("a row is bad"),
            on_row=lambda _: None,
            checker=checker,
        )
        spool.finish()
    finally:
        ids.close()
        spool.discard()
    return summary.num_rows


def read(path: Path) -> int:
    return sum(1 for _ in JobInput(files=find_files([str(path)])).rows())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--processes", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "python": sys.version.split()[0],
        "cores": os.cpu_count(),
        "load_before": [round(load, 2) for load in os.getloadavg()],
        "rows": args.rows,
        "rows_per_s": {},
    }
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        inputs = write_inputs(directory, args.rows)
        runs: dict[str, Callable[[], int]] = {}
        for kind, path in inputs.items():
            runs[f"{kind}, read"] = functools.partial(read, path)
            for count in args.processes:
                runs[f"{kind}, {count} processes"] = functools.partial(check, path, count, directory)
        rates: dict[str, list[float]] = {label: [] for label in runs}
        for _ in range(args.rounds):
            for label, run in runs.items():
                begin = time.monotonic()
                num_rows = run()
                rates[label].append(num_rows / (time.monotonic() - begin))
    for label, values in rates.items():
        report["rows_per_s"][label] = {
            "median": round(statistics.median(values)),
            "range": [round(min(values)), round(max(values))],
        }
        print(label, json.dumps(report["rows_per_s"][label]), flush=True)
    report["peak_memory_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    report["load_after"] = [round(load, 2) for load in os.getloadavg()]
    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
