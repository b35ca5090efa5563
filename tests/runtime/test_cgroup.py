"""Limits of control groups, of both versions, from files as the kernel writes them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from shoal.runtime.cgroup import cpu_quota, memory_left

GIB = 1 << 30


def write(path: Path, **files: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text + "\n")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The file in which the kernel names the groups of a process."""
    path = tmp_path / "membership"
    path.write_text("0::/job/step\n")
    return path


def test_without_control_groups_there_is_no_limit(tmp_path: Path, own: Path) -> None:
    assert cpu_quota(tmp_path / "none", own) == math.inf
    assert memory_left(tmp_path / "none", own) == math.inf
    write(tmp_path / "root", cpu__max="max 100000", memory__max="max", memory__current="5")
    assert cpu_quota(tmp_path / "root", own) == math.inf
    assert memory_left(tmp_path / "root", own) == math.inf


def test_the_tightest_group_above_the_process_counts(tmp_path: Path, own: Path) -> None:
    write(tmp_path, cpu__max="400000 100000", memory__max="9000", memory__current="1000")
    write(tmp_path / "job", cpu__max="150000 100000", memory__max="5000", memory__current="1000")
    write(tmp_path / "job" / "step", cpu__max="max 100000", memory__max="6000", memory__current="1000")
    write(tmp_path / "other", cpu__max="1 100000", memory__max="1", memory__current="1")
    assert cpu_quota(tmp_path, own) == 1.5
    assert memory_left(tmp_path, own) == 4000


def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    own = tmp_path / "membership"
    own.write_text("0::/../../docker/0123\n")
    write(tmp_path / "cg", cpu__max="50000 100000", memory__max="6000", memory__current="1000")
    assert cpu_quota(tmp_path / "cg", own) == 0.5
    assert memory_left(tmp_path / "cg", own) == 5000


def test_page_cache_is_not_used_memory(tmp_path: Path, own: Path) -> None:
    stat = "anon 1000\nfile 5500\nactive_file 2000\ninactive_file 3000\nworkingset_refault 12"
    write(tmp_path, memory__max="8000", memory__current="7000", memory__stat=stat)
    assert memory_left(tmp_path, own) == 8000 - (7000 - 5000)


def test_what_is_over_its_limit_has_nothing_left(tmp_path: Path, own: Path) -> None:
    write(tmp_path, memory__max="8000", memory__current="9000")
    assert memory_left(tmp_path, own) == 0


def test_version_1_has_a_tree_per_controller(tmp_path: Path) -> None:
    own = tmp_path / "membership"
    own.write_text("5:memory:/docker/1\n3:cpu,cpuacct:/docker/1\n2:cpuset:/\n0::/\n")
    write(tmp_path / "cpu,cpuacct", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    write(tmp_path / "cpu,cpuacct/docker/1", cpu__cfs_quota_us="200000", cpu__cfs_period_us="100000")
    write(tmp_path / "memory", memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes=str(GIB))
    assert memory_left(tmp_path, own) == math.inf
    stat = "active_file 1\ninactive_file 1\ntotal_active_file 1000\ntotal_inactive_file 500"
    group = tmp_path / "memory/docker/1"
    write(group, memory__limit_in_bytes=str(GIB), memory__usage_in_bytes="4500", memory__stat=stat)
    assert cpu_quota(tmp_path, own) == 2.0
    assert memory_left(tmp_path, own) == GIB - 3000
