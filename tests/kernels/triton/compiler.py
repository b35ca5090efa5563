"""Ahead-of-time compilation of Triton kernels, for processes in which they are not interpreted."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = (80, 86, 90, 100, 120)
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""That one program can have; of sm_89 as of sm_86."""


def compile_kernel(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    target: int,
    options: dict[str, int],
    *,
    source: type[ASTSource] = ASTSource,
) -> Any:
    """`kernel` as machine code for sm_<target>.

    types: of the parameters that are no constexprs, in Triton's notation; one that ends in "!" is a multiple of 16, as
    all pointers are. source: of the kernel's language.
    """
    names = kernel.arg_names
    assert set(names) == {*types, *constants}, f"{kernel.__name__} takes {names}"
    signature = {name: types[name].rstrip("!") if name in types else "constexpr" for name in names}
    aligned = [name for name, type_ in types.items() if type_.endswith("!") or type_.startswith("*")]
    module = source(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(module, target=GPUTarget("cuda", target, 32), options=options)
