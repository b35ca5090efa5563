"""The floating-point environment that every rank runs in."""

from __future__ import annotations

import torch


def pin_floating_point() -> dict[str, str | bool]:
    """Fix everything in torch that can change the bits of a float operation; returns it for the run manifest.

    torch keeps subnormal numbers, because that is the mode in which threads start: a flag set on one thread would make
    results depend on which thread computes them. The compiled kernels flush them to zero, each thread for the time of a
    call, as bf16 dot products do in hardware. fp32 products stay fp32, and bf16 and fp16 sums stay fp32.
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
