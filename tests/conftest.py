"""Markers, and the one rule that skips by what the machine has: `gpu` needs a GPU.

    gpu   needs a GPU
    ray   starts Ray
    slow  takes more than five seconds on a quiet machine
    docs  writes a table in docs/ when SHOAL_WRITE_DOCS is set

`make test-quick` runs what has none of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
