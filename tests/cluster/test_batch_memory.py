from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STUB_JOB = Path(__file__).with_name("stub_job.py")

ALLOWED_KIB = 16 << 10


def peak_kib(directory: Path, num_rows: int) -> int:
    source = directory / f"{num_rows}.jsonl"
    with source.open("w") as file:
        for i in range(num_rows):
            file.write(json.dumps({"custom_id": f"row number {i}", "prompt": [i % 500, 7], "max_tokens": 2}) + "\n")
    command = [sys.executable, str(STUB_JOB), str(source), str(directory / f"out{num_rows}"), "0"]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / '.src'}"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=300)
    return int(result.stdout.splitlines()[-2])


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    small, large = peak_kib(tmp_path, 1_000), peak_kib(tmp_path, 100_000)
    assert large - small < ALLOWED_KIB, f"1,000 rows: {small} KiB, 100,000 rows: {large} KiB"
