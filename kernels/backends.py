"""Names of the kernel backends. Nothing is imported, so settings can list them without torch."""

from __future__ import annotations

from typing import Literal

Backend = Literal["cpu", "triton", "reference"]
"""cpu: compiled at first use. triton: NVIDIA GPUs. reference: plain torch, not batch-invariant."""
KernelBackend = Literal["auto", Backend]
"""Values of the setting `kernel_backend`; auto: triton on a GPU, cpu elsewhere."""
