"""Kernels are interpreted in this folder's tests, where Triton is installed."""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from tests.kernels.triton import interpreter  # noqa: F401
