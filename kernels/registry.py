"""Which implementation of a kernel runs: a table of (op, backend) and the backend in force."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, TypeVar, get_args

import torch

Backend = Literal["cpu", "reference", "triton"]
Vendor = Literal["flash_mla", "deep_gemm"]
"""Libraries with kernels for some of Triton's operations, each adapted by a module of its name in kernels/vendor."""
F = TypeVar("F", bound=Callable[..., Any])

NOT_STRICT: dict[Vendor, str] = {
    "flash_mla": "its decode kernels split a context by what else is in the batch",
    "deep_gemm": "it chooses tiles by the size of the batch, and nobody has shown that this changes no bit",
}
"""Why no vendor's kernels are used where bits must not depend on the batch."""

_table: dict[tuple[str, Backend | Vendor], Callable[..., Any]] = {}
_backend: Backend = "cpu"
_vendors: tuple[Vendor, ...] = ()


def register(op: str, backend: Backend | Vendor) -> Callable[[F], F]:
    """Decorator: the function is `op` on `backend`, or a vendor's in place of Triton's."""

    def add(function: F) -> F:
        assert (op, backend) not in _table, f"{op} has two implementations for {backend}"
        _table[op, backend] = function
        return function

    return add


def implementation(op: str, backend: Backend | None = None) -> Callable[..., Any]:
    """The function that runs `op` on `backend`, by default the one in force; a chosen vendor's instead of Triton's."""
    chosen = backend or _backend
    if chosen == "triton":
        for vendor in _vendors:
            if (op, vendor) in _table:
                return _table[op, vendor]
    return _table[op, chosen]


def current_backend() -> Backend:
    return _backend


def current_vendors() -> tuple[Vendor, ...]:
    return _vendors


def set_backend(name: Backend, vendors: Sequence[Vendor] = ()) -> None:
    """Choose the backend of this process.

    "cpu" (compiled at first use), "triton" (NVIDIA GPUs; ValueError without the triton package) or "reference" (plain
    torch, not invariant). `vendors`, of which the first that has an operation runs it, go with "triton" only; whether
    their libraries work is for `check_vendors` to say.
    """
    global _backend, _vendors
    if name not in get_args(Backend):
        raise ValueError(f"kernels {name!r} do not exist, choose one of {', '.join(get_args(Backend))}")
    if vendors and name != "triton":
        raise ValueError(
            f"kernels of {', '.join(vendors)} take the place of kernels 'triton', not of {name!r}: "
            f"set vendor_kernels to none, or device to cuda"
        )
    if name == "triton":
        _import_triton_kernels()
    for vendor in vendors:
        import_module(f".vendor.{vendor}", __package__)
    _backend, _vendors = name, tuple(vendors)


def check_vendors(vendors: Sequence[Vendor], device: torch.device) -> None:
    """ValueError unless each library is there and its kernels run on this device."""
    for vendor in vendors:
        import_module(f".vendor.{vendor}", __package__).check(device)


def _import_triton_kernels() -> None:
    """Every module of kernels/triton registers its ops."""
    if find_spec("triton") is None:
        raise ValueError(
            'the "triton" kernels need the package triton, which comes with torch for CUDA: install it '
            '(pip install triton), or choose "cpu" or "reference"'
        )
    package = import_module(".triton", __package__)
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        import_module(module.name)


@contextmanager
def use_backend(name: Backend, vendors: Sequence[Vendor] = ()) -> Iterator[None]:
    """Choose the backend for the body of a `with` block."""
    previous = _backend, _vendors
    set_backend(name, vendors)
    try:
        yield
    finally:
        set_backend(*previous)


def is_invariant(backend: Backend) -> bool:
    """Whether a row's bits are independent of the other rows, of output splits and of the number of threads."""
    return backend in ("cpu", "triton")
