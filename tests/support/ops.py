"""The operations of the backends that run on a CPU without Triton."""

from __future__ import annotations

from shoal.kernels.ops import Ops

CPU_OPS = Ops("cpu")
REFERENCE_OPS = Ops("reference")
