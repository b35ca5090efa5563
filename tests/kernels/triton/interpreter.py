"""Import this before shoal.kernels.triton: without a GPU, Triton then interprets the kernels in this process."""

from __future__ import annotations

import os
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from triton.runtime import interpreter  # noqa: E402

from shoal.kernels.ops import Ops  # noqa: E402

_patch = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    _patch(tensor, scope)
    # its scalars are arrays of one element, which numpy 2.4 no longer takes for numbers
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_lang_tensor

TRITON_OPS = Ops("triton")
