"""Which implementation of a kernel runs: a table of (op, backend) and the backend in force."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, get_args

Backend = Literal["cpu", "reference"]
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
    """Choose the backend of this process: "cpu" (compiled at first use) or "reference" (plain torch, not invariant)."""
    global _backend
    if name not in get_args(Backend):
        raise ValueError(f"kernels {name!r} do not exist, choose one of {', '.join(get_args(Backend))}")
    _backend = name


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
    return backend == "cpu"
