"""Kernels are interpreted in this folder's tests, which are skipped where Triton is not installed."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import pytest

HAS_TRITON = find_spec("triton") is not None
if HAS_TRITON:
    from tests.kernels.triton import interpreter  # noqa: F401


class NeedsTriton(pytest.Module):
    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        pytest.skip("Triton is not installed", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return None if HAS_TRITON else NeedsTriton.from_parent(parent, path=module_path)
