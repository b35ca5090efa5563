"""Markers, and the one rule that skips by what the machine has: `gpu` needs a GPU.

    gpu   needs a GPU
    ray   starts Ray
    slow  takes more than five seconds on a quiet machine
    docs  writes a table in docs/ when SHOAL_WRITE_DOCS is set

`make test-quick` runs what has none of them. `make test` uses pytest-xdist: tests that start Ray come first and share
one process, because two Ray clusters at a time starve each other on a small machine.
"""

from __future__ import annotations

import pytest
import torch


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.get_closest_marker("ray") is not None:
        item.add_marker(pytest.mark.xdist_group("ray"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
