"""Implementations of every operation, registered by decorators when their modules are imported."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, TypeVar

import torch

from .backends import Backend
from .vendor import LIBRARIES, ModelProperties, Vendor

F = TypeVar("F", bound=Callable[..., Any])

IMPORTED_WHERE_USED = ("attention_hopper",)
"""Modules of kernels/triton that need one version of Triton, and register nothing."""

_table: dict[tuple[str, Backend | Vendor], Callable[..., Any]] = {}


@dataclass(frozen=True, slots=True)
class Kernel:
    """Implementation of one operation, chosen by an `Ops`."""

    op: str
    backend: Backend
    run: Callable[..., Any]


def register(op: str, backend: Backend | Vendor) -> Callable[[F], F]:
    """Decorator that registers a function as `op` on `backend`, or on a vendor's library in place of Triton."""

    def add(function: F) -> F:
        assert (op, backend) not in _table, f"{op} has two implementations for {backend}"
        _table[op, backend] = function
        return function

    return add


def find_kernel(op: str, backend: Backend, vendors: Sequence[Vendor] = ()) -> Kernel:
    """The kernel of `op` on `backend`; the first of `vendors` that implements `op` replaces Triton's."""
    for vendor in vendors:
        if (op, vendor) in _table:
            return Kernel(op, backend, _table[op, vendor])
    return Kernel(op, backend, _table[op, backend])


def load_kernels(backend: Backend, vendors: Sequence[Vendor] = ()) -> None:
    """Import the modules that register the kernels; ValueError for "triton" without the package triton."""
    if backend == "triton":
        _import_triton_kernels()
    for vendor in vendors:
        _adaptor(vendor)


def check_vendors(vendors: Sequence[Vendor], device: torch.device) -> None:
    """ValueError unless each library is installed and its kernels run on this device."""
    for vendor in vendors:
        LIBRARIES[vendor].load()
        LIBRARIES[vendor].check_device(device)
        _adaptor(vendor).check(device)


def check_model(vendors: Sequence[Vendor], model: ModelProperties) -> None:
    """ValueError for a model that one of the libraries has no kernels for."""
    for vendor in vendors:
        LIBRARIES[vendor].check_dtype(model.dtype)
        _adaptor(vendor).check_model(model)


def _adaptor(vendor: Vendor) -> ModuleType:
    return import_module(f".vendor.{vendor}", __package__)


def _import_triton_kernels() -> None:
    """Every module of kernels/triton registers its ops."""
    if find_spec("triton") is None:
        raise ValueError(
            'the "triton" kernels need the package triton, which comes with torch for CUDA: install it '
            '(pip install triton), or choose "cpu" or "reference"'
        )
    package = import_module(".triton", __package__)
    for module in pkgutil.iter_modules(package.__path__):
        if module.name not in IMPORTED_WHERE_USED:
            import_module(f"{package.__name__}.{module.name}")


def is_invariant(backend: Backend) -> bool:
    """Whether a row's bits are independent of the other rows, of output splits and of the number of threads."""
    return backend in ("cpu", "triton")
