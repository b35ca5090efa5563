"""`shoal bench kernels`: speed of every op relative to the machine's peaks, and difference from its reference."""

from __future__ import annotations

import copy
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from shoal.kernels.attention import PagedLayout
from shoal.kernels.linear import PackedWeight
from shoal.kernels.ops import Ops
from shoal.kernels.rope import RopeTable

from ..environment import environment
from ..exit_codes import ExitCode
from ..report import prepare_report, write_report
from .cases import Case, cases
from .roofline import Peaks, event_seconds, measure_device_peaks, measure_peaks
from .shapes import SHAPES, Inputs, ShapesName

COLD_BYTES, MAX_COPIES = 1 << 27, 64
"""Total size of the copies of the inputs that calls cycle through, so that inputs come from memory, not a cache."""
MIN_SECONDS = 0.2
MIN_CALLS = 5
MAX_CALLS = 2000
MAX_SECONDS = 10.0
"""After this time, three calls of a case are enough."""
OPS_THAT_WAIT = ("mha_attention", "pack_send_buffers", "unpack_recv_buffers")
"""Ops that synchronise with the device to learn sizes, and so cannot be captured in a graph."""
TOLERANCES = {torch.bfloat16: 2.0**-7, torch.float32: 2.0**-14}
"""Tolerances of float outputs, relative to the largest one; all other outputs must be equal."""


def kernels(
    *,
    shapes: ShapesName,
    ops: Sequence[str] | None,
    threads: int | None,
    device: str,
    refcheck: bool,
    output: Path | None,
    stdout: TextIO,
    stderr: TextIO,
) -> int:
    """Measure, print a table on stdout and write all figures to `output`; 1 when an op differs from its reference.

    `ops`: only these; ValueError for unknown ones. `device`: cpu or cuda; ValueError if it is not available.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch finds no GPU here")
    prepare_report(output)

    def on_case(case: Case, _row: dict[str, Any] | None) -> None:
        if _row is None:
            print(f"{case.op} {case.sizes}", file=stderr, flush=True)

    report = measure_kernels(
        shapes=shapes, names=ops, threads=threads, device=torch.device(device), refcheck=refcheck, on_case=on_case
    )
    _print_table(report, stdout)
    write_report(output, report)
    differs = any(row.get("within_tolerance") is False for row in report["kernels"])
    return ExitCode.DIFFERENT if differs else ExitCode.OK


def measure_kernels(
    *,
    shapes: ShapesName,
    names: Sequence[str] | None,
    threads: int | None,
    device: torch.device,
    refcheck: bool,
    on_case: Callable[[Case, dict[str, Any] | None], None],
) -> dict[str, Any]:
    """All figures; `on_case` is called with each case and None before it is measured, and with its row afterwards.

    On a GPU host time is excluded: times are those of CUDA graph replays, or of device events around an op that
    synchronises.
    """
    chosen = [case for case in cases(SHAPES[shapes]) if device.type == "cpu" or case.op != "sample"]
    if unknown := sorted(set(names or ()) - {case.op for case in chosen}):
        raise ValueError(f"there is no op {unknown[0]!r}; there are {', '.join(sorted({c.op for c in chosen}))}")
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    ops = Ops.choose(device)
    if device.type == "cuda":
        peaks = measure_device_peaks(device)
    else:
        peaks = measure_peaks(matrix_size=256, read_bytes=1 << 20) if shapes == "tiny" else measure_peaks()
    rows = []
    for case in chosen:
        if names is None or case.op in names:
            on_case(case, None)
            rows.append(measure_case(case, ops, peaks, device, refcheck=refcheck))
            on_case(case, rows[-1])
    return {
        "benchmark": "kernels",
        "comparable": False,
        "environment": environment(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "backend": ops.backend,
        "threads": torch.get_num_threads(),
        "shapes": {"name": shapes, **asdict(SHAPES[shapes])},
        "peaks": asdict(peaks),
        "kernels": rows,
    }


@torch.inference_mode()
def measure_case(case: Case, ops: Ops, peaks: Peaks, device: torch.device, *, refcheck: bool) -> dict[str, Any]:
    """Time and rates of one op, and its largest difference from the reference."""
    inputs = _to(case.make(Inputs(ops, device)), device)
    call = case.call(ops)
    num_copies = min(MAX_COPIES, max(1, math.ceil(COLD_BYTES / max(1, _size(inputs)))))
    copies = [inputs, *(copy.deepcopy(inputs) for _ in range(num_copies - 1))]
    if device.type == "cuda":
        seconds = _device_seconds(call, copies, waits=case.op in OPS_THAT_WAIT)
    else:
        seconds = _median_seconds(call, copies)
    del copies
    row: dict[str, Any] = {
        "op": case.op,
        "sizes": case.sizes,
        "seconds": seconds,
        "flops_per_s": case.flops / seconds,
        "bytes_per_s": case.num_bytes / seconds,
        "bound": peaks.binding(case.flops, case.num_bytes),
        "fraction_of_peak": peaks.seconds(case.flops, case.num_bytes) / seconds,
    }
    if refcheck and case.has_reference:
        ours = _tensors(call(*inputs))
        reference_ops = Ops("reference")
        reference = _tensors(case.call(reference_ops)(*_to(case.make(Inputs(reference_ops, device)), device)))
        row |= _worst_difference(ours, reference, case.tolerance)
    return row


def _median_seconds(call: Callable[..., Any], copies: Sequence[tuple[Any, ...]]) -> float:
    call(*copies[-1])
    seconds: list[float] = []
    total = 0.0
    for inputs in itertools.cycle(copies):
        begin = time.perf_counter()
        call(*inputs)
        seconds.append(time.perf_counter() - begin)
        total += seconds[-1]
        enough = len(seconds) >= MIN_CALLS and (total >= MIN_SECONDS or len(seconds) >= MAX_CALLS)
        if enough or (len(seconds) >= 3 and total >= MAX_SECONDS):
            break
    return statistics.median(seconds)


def _device_seconds(call: Callable[..., Any], copies: Sequence[tuple[Any, ...]], *, waits: bool) -> float:
    for inputs in copies[: 1 if waits else None]:
        call(*inputs)
    torch.cuda.synchronize()
    if waits:
        return statistics.median(event_seconds(partial(call, *inputs)) for inputs in [*copies, *copies][:20])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in copies:
            call(*inputs)
    graph.replay()
    return statistics.median(event_seconds(graph.replay) / len(copies) for _ in range(20))


def _to(inputs: Any, device: torch.device) -> Any:
    """A copy of the inputs with all tensors on the device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, PackedWeight):
        return replace(inputs, data=inputs.data.to(device))
    if isinstance(inputs, RopeTable):
        return replace(inputs, table=inputs.table.to(device), positions=inputs.positions.to(device))
    if isinstance(inputs, PagedLayout):
        tables = inputs.block_tables
        bounds = inputs.cu_seqlens_q
        positions = inputs.positions
        return PagedLayout(tables.to(device), bounds.to(device), positions.to(device), inputs.block_size)
    return type(inputs)(_to(part, device) for part in inputs) if isinstance(inputs, tuple | list) else inputs


def _size(inputs: Any) -> int:
    """Bytes of the tensors among the inputs."""
    if isinstance(inputs, PackedWeight):
        return inputs.data.nbytes
    if isinstance(inputs, Tensor):
        return inputs.nbytes
    return sum(_size(part) for part in inputs) if isinstance(inputs, tuple | list) else 0


def _tensors(output: Any) -> list[Tensor]:
    """All tensors of an op's result, and its lists of numbers as tensors."""
    if isinstance(output, Tensor):
        return [output.cpu()]
    if isinstance(output, list) and all(isinstance(value, int) for value in output):
        return [torch.tensor(output)]
    return [tensor for part in output for tensor in _tensors(part)]


def _worst_difference(ours: Sequence[Tensor], reference: Sequence[Tensor], tolerance: float | None) -> dict[str, Any]:
    """Largest difference of an output from its reference, as a multiple of its tolerance."""
    compared = []
    for x, y in zip(ours, reference, strict=True):
        allowed = TOLERANCES.get(y.dtype, 0.0) if tolerance is None else tolerance
        compared.append((difference(x, y), allowed))
    worst, allowed = max(compared, key=lambda pair: (pair[0] > pair[1], pair[0] / (pair[1] or 1.0)))
    return {"difference": worst, "tolerance": allowed, "within_tolerance": worst <= allowed}


def difference(x: Tensor, reference: Tensor) -> float:
    """Floats: largest distance relative to the largest reference value. Integers: per row, the fraction of numbers that
    only one of the two has, or 1 if they have the same in another order."""
    if x.shape != reference.shape or x.dtype != reference.dtype:
        return math.inf
    if not x.numel() or torch.equal(x, reference):
        return 0.0
    if x.is_floating_point():
        distance = (x.float() - reference.float()).abs().max().item() / (reference.float().abs().max().item() or 1.0)
        return math.inf if math.isnan(distance) else distance
    pairs = zip(x.flatten(0, -2).tolist(), reference.flatten(0, -2).tolist(), strict=True) if x.dim() > 1 else []
    missing = sum(len(set(theirs) - set(ours)) for ours, theirs in pairs)
    return missing / x.numel() or 1.0


def _print_table(report: dict[str, Any], stdout: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table

    peaks = report["peaks"]
    table = Table(
        title=f"{report['device']}, {report['threads']} threads; peaks: {peaks['flops_per_s'] / 1e9:.0f} GFLOP/s "
        f"in bfloat16, {peaks['bytes_per_s'] / 1e9:.1f} GB/s"
    )
    table.add_column("op")
    table.add_column("sizes")
    for name in ("us", "GFLOP/s", "GB/s", "of peak", "difference", "tolerance"):
        table.add_column(name, justify="right")
    for row in report["kernels"]:
        checked = "difference" in row
        colour = "[red]" if checked and not row["within_tolerance"] else ""
        table.add_row(
            row["op"],
            row["sizes"],
            f"{1e6 * row['seconds']:.1f}",
            f"{row['flops_per_s'] / 1e9:.1f}",
            f"{row['bytes_per_s'] / 1e9:.1f}",
            f"{row['fraction_of_peak']:.0%} {row['bound']}",
            f"{colour}{row['difference']:.1e}" if checked else "",
            f"{row['tolerance']:.1e}" if checked else "",
        )
    Console(file=stdout, width=None if stdout.isatty() else 140).print(table)
