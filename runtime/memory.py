"""How much memory a device has left."""

from __future__ import annotations

import torch


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated without swapping or failing, as the operating system or the driver sees it."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable line; set num_kv_blocks")
