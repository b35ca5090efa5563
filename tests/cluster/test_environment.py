"""How many threads a process gets: affinity, the CPU quota of its control group and OMP_NUM_THREADS."""

from __future__ import annotations

import math
import os

import pytest

from shoal.cluster import environment
from shoal.cluster.environment import default_num_threads, num_cores


@pytest.mark.parametrize(("quota", "expected"), [(math.inf, 8), (0.5, 1), (1.0, 1), (2.5, 2), (100.0, 8)])
def test_a_cpu_quota_counts_as_so_many_cores(monkeypatch: pytest.MonkeyPatch, quota: float, expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(environment, "cpu_quota", lambda: quota)
    assert num_cores() == expected


@pytest.mark.parametrize(
    ("omp", "num_workers", "expected"),
    [(None, 1, 8), (None, 3, 2), (None, 9, 1), ("1", 1, 1), ("3", 2, 3), ("6", 2, 4), ("2,4", 1, 2), ("many", 1, 8)],
)
def test_omp_num_threads_bounds_the_share_of_a_worker(
    monkeypatch: pytest.MonkeyPatch, omp: str | None, num_workers: int, expected: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    assert default_num_threads(8, num_workers) == expected
