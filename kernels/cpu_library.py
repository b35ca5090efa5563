"""Functions of the compiled CPU kernels. Their declarations here and in C++ are compared before anything is called."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

from .build import load_library

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
"""shoal::DType of the dtypes that the kernels compute in."""
MIN_PARALLEL_WORK = 2**19
"""Multiply-adds below which starting threads costs more than it gains."""

_SCALARS = {ctypes.c_int64: "int64", ctypes.c_float: "float32", ctypes.c_void_p: "*"}
_declared: dict[str, CFunction] = {}


class CFunction:
    """A function of the CPU library that returns nothing.

    The library is built, loaded and compared with all declarations when the first function is called.
    """

    __slots__ = ("_function", "argument_types", "name")

    def __init__(self, name: str, *argument_types: type[Any]) -> None:
        """Pointers are `c_void_p`, but `POINTER(..)` to structs, whose fields are compared as well."""
        assert name not in _declared, f"{name} is declared twice"
        _declared[name] = self
        self.name = name
        self.argument_types = argument_types
        self._function: Callable[..., None] | None = None

    def __call__(self, *arguments: Any) -> None:
        """Run it; ctypes.ArgumentError for arguments of other types."""
        if self._function is None:
            self._function = self._bind()
        self._function(*arguments)

    def _bind(self) -> Callable[..., None]:
        _check_declarations()
        check_declaration(self)  # it may have been declared after the others were checked
        function = getattr(load_library(), self.name)
        function.argtypes = self.argument_types
        function.restype = None
        return cast(Callable[..., None], function)


def declared_functions() -> list[CFunction]:
    """The functions that the modules imported so far declare."""
    return list(_declared.values())


@functools.cache
def exported() -> dict[str, str]:
    """Descriptions of the library's functions and structs by name, as kernels/cpu/abi.cpp prints them."""
    function = load_library().shoal_abi
    function.restype = ctypes.c_char_p
    lines = function().decode().splitlines()
    return {line.split("(")[0].split("{")[0]: line for line in lines}


def check_declaration(function: CFunction) -> None:
    """RuntimeError unless the library has this function, with these arguments, and the same fields of its structs."""
    theirs = exported()
    for name, ours in _descriptions(function):
        if name not in theirs:
            raise RuntimeError(f"the CPU kernels do not export {name}; add SHOAL_EXPORT or SHOAL_STRUCT for it in C++")
        if theirs[name] != ours:
            raise RuntimeError(
                f"{name} of the CPU kernels differs from its declaration in Python; make them equal\n"
                f"C++:    {theirs[name]}\n"
                f"Python: {ours}"
            )


@functools.cache
def _check_declarations() -> None:
    """RuntimeError if any declaration differs from the library."""
    for function in _declared.values():
        check_declaration(function)


def _descriptions(function: CFunction) -> Iterator[tuple[str, str]]:
    """(name, description) of the function and of every struct that it is given."""
    types = ", ".join(_type_name(kind) for kind in function.argument_types)
    yield function.name, f"{function.name}({types})"
    for kind in function.argument_types:
        yield from _struct_descriptions(getattr(kind, "_type_", kind))


def _struct_descriptions(kind: Any) -> Iterator[tuple[str, str]]:
    if not _is_struct(kind):
        return
    fields = ", ".join(f"{name} {_type_name(field)} @{getattr(kind, name).offset}" for name, field, *_ in kind._fields_)
    yield kind.__name__, f"{kind.__name__}{{{fields}}} {ctypes.sizeof(kind)} bytes"
    for _, field, *_ in kind._fields_:
        yield from _struct_descriptions(field)


def _type_name(kind: Any) -> str:
    """int64, float32, a struct's name, or with * a pointer: to a struct by name, to anything else without."""
    if kind in _SCALARS:
        return _SCALARS[kind]
    if _is_struct(kind):
        return str(kind.__name__)
    target = kind._type_  # of POINTER(..)
    return f"{target.__name__ if _is_struct(target) else ''}*"


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, ctypes.Structure)


def num_threads(work: int) -> int:
    """Threads for a kernel call of `work` multiply-adds: torch's setting, or one for little work."""
    return torch.get_num_threads() if work >= MIN_PARALLEL_WORK else 1
