from __future__ import annotations

from pathlib import Path

import torch

from shoal.runtime.memory import available_memory, container_memory


def test_the_container_limit_counts(tmp_path: Path) -> None:
    assert container_memory(tmp_path) == float("inf"), "no control group"
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5000\n")
    assert container_memory(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("8000\n")
    assert container_memory(tmp_path) == 3000
    (tmp_path / "memory.current").write_text("9000\n")
    assert container_memory(tmp_path) == 0


def test_available_memory_is_below_the_total() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < available_memory(torch.device("cpu")) < total
