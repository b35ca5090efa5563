"""Markers, and the one rule that skips by what the machine has: `gpu` needs a GPU.

    gpu   needs a GPU
    ray   starts Ray
    slow  takes more than five seconds on a quiet machine
    docs  writes a table in docs/ when SHOAL_WRITE_DOCS is set

`make test-quick` runs the tests that have none of them. `make test` uses pytest-xdist, with the files that start Ray in
one process: several Ray clusters at a time starve each other on a small machine.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

try:
    from xdist.scheduler import LoadScopeScheduling
except ModuleNotFoundError:  # tests run in one process without it
    LoadScopeScheduling = object


class RayTogether(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """Distribute tests one by one, and the files that start Ray as one piece, which comes first."""

    def _split_scope(self, nodeid: str) -> str:
        return "ray" if _starts_ray(nodeid.partition("::")[0]) else nodeid


@functools.cache
def _starts_ray(path: str) -> bool:
    return "mark.ray" in (Path(__file__).parents[1] / path).read_text()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> RayTogether:
    return RayTogether(config, log)


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
