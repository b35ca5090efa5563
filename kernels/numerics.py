"""The floating-point mode and the thread count that engines run with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def set_deterministic_fp_mode() -> dict[str, str | bool]:
    """Fix every torch setting that can change the bits of a float operation; returns them for the run manifest.

    The settings apply to the process: a host program that computes beside an engine uses `torch_settings`.

    torch keeps subnormal numbers, the default of new threads: a flag set on one thread would make results depend on the
    thread that computes them. The compiled kernels flush them to zero in each thread for the duration of a call, as
    bf16 dot products do in hardware. fp32 matmuls stay fp32, and bf16 and fp16 sums stay fp32.
    """
    torch.set_flush_denormal(False)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    return {
        "flush_denormal": False,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "bf16_reduced_precision_reduction": False,
        "fp16_reduced_precision_reduction": False,
        "torch": str(torch.__version__),
    }


@contextmanager
def torch_settings(num_threads: int) -> Iterator[None]:
    """Run the block with `num_threads` threads in the deterministic floating-point mode, then restore torch's settings.

    For an engine that shares its process with other engines or with a host program.
    """
    matmul = torch.backends.cuda.matmul
    threads = torch.get_num_threads()
    flushes = _flushes_denormals()
    precision = torch.get_float32_matmul_precision()
    bf16_reduction = matmul.allow_bf16_reduced_precision_reduction
    fp16_reduction = matmul.allow_fp16_reduced_precision_reduction
    torch.set_num_threads(num_threads)
    set_deterministic_fp_mode()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(flushes)
        torch.set_float32_matmul_precision(precision)
        matmul.allow_bf16_reduced_precision_reduction = bf16_reduction
        matmul.allow_fp16_reduced_precision_reduction = fp16_reduction


def _flushes_denormals() -> bool:
    """Whether this thread flushes subnormal results to zero; torch has no getter."""
    return (torch.tensor([2.0**-133]) * 1.0).item() == 0.0
