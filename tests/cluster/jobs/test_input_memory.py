from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.cluster.jobs.input.lines import MAX_LINE_BYTES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
STUB_JOB = ROOT / "tests" / "support" / "stub_job.py"

ALLOWED_KIB = 16 << 10
ALLOWED_PER_LINE_BYTE = 32


def peak_kib(source: Path, *, exit_code: int = 0) -> int:
    """Peak memory of a job with this input."""
    command = [sys.executable, str(STUB_JOB), str(source), str(source.with_suffix("")), "0"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / ".src")}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == exit_code, result.stderr
    return int(result.stdout.splitlines()[-2])


def peak_kib_of_rows(directory: Path, num_rows: int) -> int:
    source = directory / f"{num_rows}.jsonl"
    with source.open("w") as file:
        for i in range(num_rows):
            file.write(json.dumps({"custom_id": f"row number {i}", "prompt": [i % 500, 7], "max_tokens": 2}) + "\n")
    return peak_kib(source)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> int:
    return peak_kib_of_rows(tmp_path_factory.mktemp("small"), 1_000)


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, small: int) -> None:
    large = peak_kib_of_rows(tmp_path, 100_000)
    assert large - small < ALLOWED_KIB, f"1,000 rows: {small} KiB, 100,000 rows: {large} KiB"


def hostile_lines() -> Iterator[bytes]:
    """Each almost as long as a line may be, and of what takes most memory for its length."""
    room = MAX_LINE_BYTES - 64
    yield b'{"prompt":[' + b",".join([b"[]"] * (room // 3)) + b"]}"
    yield b"{" + b",".join(b'"%x":1' % i for i in range(room // 12)) + b"}"
    yield b'{"' + b"x" * room + b'":1}'
    key = b'"' + b"\xf3\xa0\x80\x81" * (room // 9) + b'":1'  # ten characters each when they are quoted
    yield b"{" + key + b"," + key + b"}"
    yield b'{"prompt":"a","stop":"' + b"x" * room + b'"}'
    yield b'{"prompt":"' + b"x" * (8 * room) + b'"}'


def test_no_line_takes_more_than_a_multiple_of_its_length(tmp_path: Path, small: int) -> None:
    source = tmp_path / "in.jsonl"
    lines = list(hostile_lines())
    source.write_bytes(b"\n".join(lines))
    hostile = peak_kib(source, exit_code=3)
    assert len((tmp_path / "in" / "errors.jsonl").read_bytes().splitlines()) == len(lines)
    assert hostile - small < ALLOWED_PER_LINE_BYTE * MAX_LINE_BYTES >> 10, f"1,000 rows: {small} KiB, these: {hostile}"
