"""Spans in the traces of torch.profiler."""

from __future__ import annotations

import torch

from shoal.parallel.spans import SpanName


class ProfilerRanges:
    """A listener that shows spans as ranges: in traces of torch.profiler, and as NVTX ranges under `emit_nvtx`."""

    def __init__(self) -> None:
        self._open: list[torch.profiler.record_function] = []

    def enter(self, name: SpanName) -> None:
        self._open.append(torch.profiler.record_function(name))
        self._open[-1].__enter__()  # type: ignore[no-untyped-call]

    def leave(self, name: SpanName) -> None:
        self._open.pop().__exit__(None, None, None)
