"""What a result was made with: versions of packages, the processor, and the memory that the processes took."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from shoal.runtime.cgroup import cpu_quota

PACKAGES = ("shoal", "torch", "ray", "numpy", "safetensors", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that take part in an answer."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def environment() -> dict[str, Any]:
    """What a reader needs to judge a measurement that was driven from this machine."""
    return {
        "cpu": _first_value(Path("/proc/cpuinfo"), "model name") or platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": num_cores(),
        "memory": _first_value(Path("/proc/meminfo"), "MemTotal"),
        "platform": platform.platform(),
        "versions": versions(),
    }


def num_cores() -> int:
    """Cores that this process may use: by its affinity mask and the CPU quota of its control groups, at least 1."""
    return int(max(1, min(len(os.sched_getaffinity(0)), cpu_quota())))


def default_num_threads(num_cores: int, num_workers: int = 1) -> int:
    """Threads of one of `num_workers` processes that share `num_cores`, at least 1; OMP_NUM_THREADS is a bound."""
    share = max(1, num_cores // num_workers)
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # one number per level of nesting
    return min(share, max(1, int(wanted))) if wanted.isdecimal() else share


def peak_rss_mib() -> dict[str, Any]:
    """Largest resident sizes so far, in MiB, of this process and of the Ray workers that descend from it.

    Pages that processes share count in each of them.
    """
    own = os.getpid()
    parents = {pid: int(parent) for pid in _pids() if (parent := _first_value(_status(pid), "PPid"))}
    workers = [pid for pid in parents if _descends(pid, own, parents) and _is_worker(pid)]
    return {
        "driver": _peak_mib(own),
        "workers": sorted((_peak_mib(pid) for pid in workers), reverse=True),
        "covers": "this process and its Ray workers on this node; workers of a cluster that it joined are not seen",
    }


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]


def _descends(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    while pid in parents:
        pid = parents[pid]
        if pid == ancestor:
            return True
    return False


def _is_worker(pid: int) -> bool:
    """Ray names a process after the actor in it and what it does: ray::Worker.run."""
    return _read(Path(f"/proc/{pid}/cmdline")).startswith("ray::Worker")


def _peak_mib(pid: int) -> int:
    return int((_first_value(_status(pid), "VmHWM") or "0").split()[0]) // 1024


def _status(pid: int) -> Path:
    return Path(f"/proc/{pid}/status")


def _first_value(path: Path, name: str) -> str | None:
    """The value of the first line `name: value`; None without one."""
    for line in _read(path).splitlines():
        if line.startswith(name):
            return line.split(":", 1)[1].strip()
    return None


def _read(path: Path) -> str:
    """Empty for a process that has ended meanwhile."""
    try:
        return path.read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed as a package"
