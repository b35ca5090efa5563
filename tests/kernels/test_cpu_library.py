"""Declarations of the CPU kernels in Python are those of the compiled library."""

from __future__ import annotations

import ctypes
import pkgutil
import re
from ctypes import POINTER, c_float, c_int64, c_void_p
from importlib import import_module
from pathlib import Path

import pytest
import torch

import shoal.kernels
from shoal.kernels import cpu_library
from shoal.kernels.cpu_library import CFunction, check_declaration, declared_functions, exported
from shoal.kernels.kv_format import KVCacheArgs, shoal_write_latents
from shoal.kernels.norm import shoal_rms_norm

SOURCES = Path(shoal.kernels.__path__[0]) / "cpu"


@pytest.fixture(autouse=True)
def _other_declarations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Declarations of a test are forgotten afterwards."""
    for module in pkgutil.iter_modules(shoal.kernels.__path__, "shoal.kernels."):
        import_module(module.name)
    monkeypatch.setattr(cpu_library, "_declared", dict(cpu_library._declared))


def redeclare(name: str, *argument_types: type) -> CFunction:
    del cpu_library._declared[name]
    return CFunction(name, *argument_types)


def test_every_function_of_the_sources_is_exported_and_declared_once() -> None:
    defined = [
        name
        for path in SOURCES.glob("*.cpp")
        for name in re.findall(r"^(?:extern \"C\" )?void (shoal_\w+)\(", path.read_text(), re.MULTILINE)
    ]
    functions = {name for name, line in exported().items() if line.startswith(f"{name}(")}
    assert len(defined) == len(set(defined))
    assert set(defined) == functions == {function.name for function in declared_functions()}
    for function in declared_functions():
        check_declaration(function)


def test_descriptions_of_the_library() -> None:
    assert exported()["shoal_swiglu"] == "shoal_swiglu(int64, *, int64, *, int64, int64, int64)"
    assert exported()["shoal_rms_norm"] == "shoal_rms_norm(int64, *, int64, int64, int64, *, float32, *, int64)"
    assert (
        exported()["KVCacheArgs"]
        == "KVCacheArgs{data * @0, stride int64 @8, num_slots int64 @16, fp8 int64 @24} 32 bytes"
    )
    assert exported()["PagedArgs"] == "PagedArgs{kv_cache KVCacheArgs @0, layout LayoutArgs @32} 80 bytes"
    assert (
        "shoal_index_topk(int64, *, int64, int64, *, int64, int64, int64, LayoutArgs*, IndexKeys*, "
        in (exported()["shoal_index_topk"])
    )


@pytest.mark.parametrize(
    "types",
    [
        [c_int64, c_void_p, *[c_int64] * 2, c_void_p, c_float, c_void_p, c_int64],
        [c_int64, c_void_p, *[c_int64] * 3, c_void_p, c_int64, c_void_p, c_int64],
        [c_int64, c_void_p, *[c_int64] * 3, c_void_p, c_float, c_void_p, POINTER(KVCacheArgs)],
    ],
    ids=["one missing", "not a float", "a struct for a number"],
)
def test_a_wrong_argument_is_refused_before_the_call(types: list[type]) -> None:
    wrong = redeclare("shoal_rms_norm", *types)
    with pytest.raises(
        RuntimeError, match=r"shoal_rms_norm of the CPU kernels differs[^\n]*\nC\+\+: .*float32.*\nPython"
    ):
        wrong()
    check_declaration(shoal_rms_norm)


def struct(name: str, fields: list[tuple[str, type]]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": fields})


FIELDS: list[tuple[str, type]] = [("data", c_void_p), ("stride", c_int64), ("num_slots", c_int64), ("fp8", c_int64)]


@pytest.mark.parametrize(
    "fields",
    [
        FIELDS[:3],
        [FIELDS[0], FIELDS[2], FIELDS[1], FIELDS[3]],
        [*FIELDS[:3], ("fp8", c_float)],
        [*FIELDS, ("device", c_int64)],
    ],
    ids=["one missing", "exchanged", "another type", "one too many"],
)
def test_a_wrong_field_is_refused_before_the_call(fields: list[tuple[str, type]]) -> None:
    kv_cache = POINTER(struct("KVCacheArgs", fields))
    types = [kv_cache if kind is POINTER(KVCacheArgs) else kind for kind in shoal_write_latents.argument_types]
    assert kv_cache in types
    with pytest.raises(RuntimeError, match="KVCacheArgs of the CPU kernels differs from its declaration in Python"):
        redeclare("shoal_write_latents", *types)()


def test_a_function_or_struct_that_is_not_exported_is_refused() -> None:
    with pytest.raises(RuntimeError, match="the CPU kernels do not export shoal_no_such"):
        CFunction("shoal_no_such", c_int64)()


def test_a_wrong_declaration_stops_every_function() -> None:
    """The first call compares all of them."""
    cpu_library._check_declarations.cache_clear()
    redeclare("shoal_swiglu", c_int64)
    right = redeclare("shoal_rms_norm", *shoal_rms_norm.argument_types)
    with pytest.raises(RuntimeError, match="shoal_swiglu of the CPU kernels differs"):
        right()


def test_small_work_takes_one_thread_and_large_work_torch_s_setting() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert cpu_library.num_threads(cpu_library.MIN_PARALLEL_WORK - 1) == 1
        assert cpu_library.num_threads(cpu_library.MIN_PARALLEL_WORK) == 2
        torch.set_num_threads(1)
        assert cpu_library.num_threads(cpu_library.MIN_PARALLEL_WORK) == 1
    finally:
        torch.set_num_threads(threads)
