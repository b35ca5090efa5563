from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shoal.runtime import memory
from shoal.runtime.memory import available_memory


def test_available_memory_is_below_the_total() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < available_memory(torch.device("cpu")) < total


def test_the_limit_of_the_control_group_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_left", lambda: 3000.0)
    assert available_memory(torch.device("cpu")) == 3000
