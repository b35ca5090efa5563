"""Ahead-of-time compilation of Triton kernels, for processes in which they are not interpreted."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime.jit import JITFunction

Case = tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]
"""A kernel, types of its parameters that are no constexprs, values of those that are, options of the compiler."""
TARGETS = (80, 86, 90, 100, 120)
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Shared memory that one program can have; sm_89 has that of sm_86."""


def compile_kernel(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], target: int, options: dict[str, int]
) -> Any:
    """`kernel` as machine code for sm_<target>.

    types: in Triton's notation; one that ends in "!" is a multiple of 16, as all pointers are.
    """
    names = kernel.arg_names
    assert set(names) == {*types, *constants}, f"{kernel.__name__} takes {names}"
    signature = {name: types[name].rstrip("!") if name in types else "constexpr" for name in names}
    aligned = [name for name, type_ in types.items() if type_.endswith("!") or type_.startswith("*")]
    source = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    module = source(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(module, target=GPUTarget("cuda", target, 32), options=options)


def compile_cases(cases: Iterable[Case], target: int) -> set[str]:
    """Names of the kernels that there was a case for."""
    seen = set()
    for kernel, types, constants, options in cases:
        compiled = compile_kernel(kernel, types, constants, target, options)
        if "-v" in sys.argv:
            print(target, kernel.__name__, constants, options, compiled.metadata.shared, flush=True)
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= SHARED_BYTES[target], f"{kernel.__name__} {constants} on sm_{target}"
        seen.add(f"{kernel.fn.__module__}.{kernel.__name__}")
    return seen


def compile_modules(modules: Iterable[ModuleType], compile_all: Callable[[int], set[str]]) -> None:
    """`compile_all` for every target, some at a time; fails if it has no case for a kernel of `modules`."""
    missing = {f"{m.__name__}.{k}" for m in modules for k, v in vars(m).items() if isinstance(v, JITFunction)}
    missing = {name for name in missing if name.endswith("_kernel")}
    with ProcessPoolExecutor() as pool:
        for seen in pool.map(compile_all, TARGETS):
            missing -= seen
    assert not missing, f"no case for {sorted(missing)}"
