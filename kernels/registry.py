"""Which implementation of a kernel runs: a table of (op, backend) and the backend in force."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, TypeVar, get_args

Backend = Literal["cpu", "reference", "triton"]
F = TypeVar("F", bound=Callable[..., Any])

_table: dict[tuple[str, Backend], Callable[..., Any]] = {}
_backend: Backend = "cpu"


def register(op: str, backend: Backend) -> Callable[[F], F]:
    """Decorator: the function is `op` on `backend`."""

    def add(function: F) -> F:
        assert (op, backend) not in _table, f"{op} has two implementations for {backend}"
        _table[op, backend] = function
        return function

    return add


def implementation(op: str, backend: Backend | None = None) -> Callable[..., Any]:
    """The function that runs `op` on `backend`, by default the one in force."""
    return _table[op, backend or _backend]


def current_backend() -> Backend:
    return _backend


def set_backend(name: Backend) -> None:
    """Choose the backend of this process.

    "cpu" (compiled at first use), "triton" (NVIDIA GPUs; ValueError without the triton package) or "reference" (plain
    torch, not invariant).
    """
    global _backend
    if name not in get_args(Backend):
        raise ValueError(f"kernels {name!r} do not exist, choose one of {', '.join(get_args(Backend))}")
    if name == "triton":
        _import_triton_kernels()
    _backend = name


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
def use_backend(name: Backend) -> Iterator[None]:
    """Choose the backend for the body of a `with` block."""
    previous = _backend
    set_backend(name)
    try:
        yield
    finally:
        set_backend(previous)


def is_invariant(backend: Backend) -> bool:
    """Whether a row's bits are independent of the other rows, of output splits and of the number of threads."""
    return backend in ("cpu", "triton")
