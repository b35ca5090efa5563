"""The table of vendor libraries is what the adaptors, the settings and the documents go by."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
import torch

from shoal.kernels import registry
from shoal.kernels.registry import check_model, check_vendors, load_kernels
from shoal.kernels.vendor import (
    LIBRARIES,
    Library,
    ModelProperties,
    Vendor,
    describe_libraries,
    select_vendors,
    why_not_invariant,
)
from tests.support.fakes.install import install

ROOT = Path(__file__).parents[2]
each_library = pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)
MODEL = ModelProperties(
    device=torch.device("cpu"),
    dtype=torch.bfloat16,
    num_heads=64,
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    block_size=64,
    fp8_cache=True,
    index_shape=(32, 128),
    hidden_size=7168,
    moe_intermediate_size=2048,
    block_fp8_weights=True,
    ue8m0_scales=True,
)
"""A model that every library has kernels for."""


def test_the_settings_name_every_library() -> None:
    assert get_args(Vendor) == tuple(LIBRARIES)
    assert select_vendors("none") == ()
    assert select_vendors("all") == tuple(LIBRARIES)
    assert select_vendors("deep_gemm") == ("deep_gemm",)


@each_library
def test_the_adaptor_registers_the_operations_of_the_table(library: Library) -> None:
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    load_kernels("triton", [library.module])
    assert sorted(library.ops) == sorted(op for op, backend in registry._table if backend == library.module)


@each_library
def test_the_adaptor_calls_the_functions_of_the_table(library: Library) -> None:
    source = (ROOT / "kernels" / "vendor" / f"{library.module}.py").read_text()
    assert set(library.functions) == set(re.findall(r"(?:library|_library\(\))\.(\w+)", source))


@each_library
def test_documents_name_the_library(library: Library) -> None:
    row = f"| `vendor_kernels: {library.module}` | {library.title} | {library.purpose}"
    assert row in (ROOT / "docs" / "gpu.md").read_text()
    assert f"{library.title} for {library.purpose}" in describe_libraries()


def test_only_libraries_that_are_not_invariant_have_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not_invariant(("flash_mla",)).startswith("flash_mla: its decode kernels split")
    assert why_not_invariant(()) == ""
    monkeypatch.setitem(LIBRARIES, "flash_mla", replace(LIBRARIES["flash_mla"], not_invariant=""))
    assert why_not_invariant(("flash_mla",)) == ""
    assert why_not_invariant(("flash_mla", "deep_gemm")).startswith("deep_gemm: ")


@each_library
def test_an_older_gpu_is_refused(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, library.module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    with pytest.raises(ValueError, match=f"vendor_kernels {library.module} needs sm_90 or newer, cuda:1 is sm_89"):
        check_vendors([library.module], torch.device("cuda:1"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    library.check_device(torch.device("cuda:1"))


def test_an_incompatible_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    library = LIBRARIES["deep_gemm"]
    older = ModuleType("deep_gemm")
    assert library.missing_functions(older) == list(library.functions)
    install(monkeypatch, "deep_gemm")
    assert library.missing_functions(library.load()) == []
    monkeypatch.delattr("deep_gemm.get_num_sms")
    with pytest.raises(ValueError, match="the installed deep_gemm has no get_num_sms; build a newer one"):
        library.load()


@each_library
def test_a_model_in_another_dtype_is_refused(library: Library) -> None:
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    check_model([library.module], MODEL)
    with pytest.raises(ValueError, match=f"vendor_kernels {library.module} computes in bfloat16, not in float32; set"):
        check_model([library.module], replace(MODEL, dtype=torch.float32))


@pytest.mark.parametrize(
    ("vendor", "change", "message"),
    [
        ("flash_mla", {"kv_lora_rank": 256}, "flash_mla attends in bfloat16 with kv_lora_rank 512"),
        ("flash_mla", {"index_shape": None}, "flash_mla reads an FP8 cache where attention is sparse"),
        ("flash_mla", {"index_shape": None, "fp8_cache": False, "block_size": 32}, "with block_size 64, not 32"),
        ("deep_gemm", {"block_fp8_weights": False}, "and other weights"),
        ("deep_gemm", {"index_shape": (8, 128)}, "index_n_heads 32 or 64, not with 64, 128 and 8"),
    ],
)
def test_a_model_without_kernels_is_refused(vendor: Vendor, change: dict[str, object], message: str) -> None:
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    with pytest.raises(ValueError, match=message):
        check_model([vendor], replace(MODEL, **change))  # type: ignore[arg-type]
