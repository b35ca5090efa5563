"""Free memory of a device, and returning freed memory to the system."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import torch

from .cgroup import memory_left


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated without swapping or failing, on the GPU or in this machine or container."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(min(int(line.split()[1]) * 1024, memory_left()))
    raise RuntimeError("/proc/meminfo has no MemAvailable line; set num_kv_blocks")


def release_freed_memory() -> None:
    """Return memory that the C library keeps after it was freed to the system; does nothing without glibc."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
