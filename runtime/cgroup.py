"""What the control groups of this process allow: CPUs and memory, in both versions of Linux' control groups.

A limit of any group on the way from the process's own to the root counts. In a container, the mounted root is often
the process's own group, whatever path the kernel names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_UNLIMITED_V1 = 1 << 60
"""Version 1 writes the largest multiple of a page for "no limit"."""


def cpu_quota(root: Path = ROOT, membership: Path = _MEMBERSHIP) -> float:
    """CPUs that may be used at a time, on average over a scheduling period; infinity without a limit."""
    quotas = [math.inf]
    for group in _groups("cpu", root, membership):
        quota, _, period = _read(group / "cpu.max").partition(" ")
        if not quota:
            quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas)


def memory_left(root: Path = ROOT, membership: Path = _MEMBERSHIP) -> float:
    """Bytes that may still be allocated; infinity without a limit. Page cache counts as free: it is given up first."""
    left = [math.inf]
    for group in _groups("memory", root, membership):
        limit = _read(group / "memory.max") or _read(group / "memory.limit_in_bytes")
        used = _read(group / "memory.current") or _read(group / "memory.usage_in_bytes")
        if limit.isdecimal() and used.isdecimal() and int(limit) < _UNLIMITED_V1:
            left.append(max(0, int(limit) - max(0, int(used) - _page_cache(group))))
    return min(left)


def _page_cache(group: Path) -> int:
    lines = [line.split() for line in _read(group / "memory.stat").splitlines()]
    values = {line[0]: int(line[1]) for line in lines if len(line) == 2 and line[1].isdecimal()}
    # Version 1 counts a group's children only in the fields named total.
    return sum(values.get(f"total_{name}", values.get(name, 0)) for name in ("active_file", "inactive_file"))


def _groups(controller: str, root: Path, membership: Path) -> Iterator[Path]:
    """The group of this process for a controller and all groups above it, as far as they can be seen."""
    for line in _read(membership).splitlines() or ["0::/"]:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controllers if controllers else root
        own = top / path.lstrip("/")
        yield from (group for group in (own, *own.parents) if group == top or top in group.parents)


def _read(path: Path) -> str:
    """A file without its last line ending; empty for one that is not there."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
