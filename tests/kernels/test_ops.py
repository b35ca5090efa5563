from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from shoal.kernels.backends import Backend
from shoal.kernels.numerics import set_deterministic_fp_mode, torch_settings
from shoal.kernels.ops import Op, Ops, choose_backend
from shoal.kernels.registry import find_kernel, is_invariant, register
from tests.support.ops import CPU_OPS, REFERENCE_OPS


def test_compiled_and_triton_kernels_are_batch_invariant() -> None:
    assert is_invariant("cpu")
    assert is_invariant("triton")
    assert not is_invariant("reference")


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
def test_every_operation_is_bound_when_the_table_is_made(backend: Backend) -> None:
    if backend == "triton" and find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    names = {name for name, op in vars(Ops).items() if isinstance(op, Op)}
    assert len(names) == 31
    assert names <= vars(Ops(backend)).keys()


def test_a_backend_runs_its_own_implementation_and_the_first_vendor_replaces_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shoal.kernels.registry._table", {})

    @register("test_op", "cpu")
    def on_cpu() -> str:
        return "cpu"

    @register("test_op", "triton")
    def on_triton() -> str:
        return "triton"

    @register("test_op", "deep_gemm")
    def on_deep_gemm() -> str:
        return "deep_gemm"

    assert find_kernel("test_op", "cpu").run() == "cpu"
    assert find_kernel("test_op", "triton").run() == "triton"
    assert find_kernel("test_op", "triton", ["flash_mla", "deep_gemm"]).run() == "deep_gemm"
    assert find_kernel("test_op", "triton", ["deep_gemm"]).backend == "triton"
    with pytest.raises(AssertionError, match="two implementations"):
        register("test_op", "cpu")(on_cpu)


def chain(row: Tensor) -> float:
    """The sum that kernels/linear.py promises: in fp32, k ascending."""
    total = torch.tensor(0.0)
    for x in row:
        total += x
    return total.item()


def test_tables_of_different_backends_do_not_disturb_one_another() -> None:
    """The compiled kernel's order of sums tells it from the reference's."""
    x = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(1, 4096)
    expected = {"cpu": chain(x[0]), "reference": (x @ ones.T).item()}
    assert expected["cpu"] != expected["reference"]
    tables = {"cpu": CPU_OPS, "reference": REFERENCE_OPS}
    weights = {name: ops.pack_weight(ones) for name, ops in tables.items()}
    for name in ("cpu", "reference", "reference", "cpu", "reference", "cpu"):
        Ops("reference" if name == "cpu" else "cpu")
        assert tables[name].linear(x, weights[name]).item() == expected[name]


def test_a_weight_of_another_backend_is_refused() -> None:
    w = REFERENCE_OPS.pack_weight(torch.ones(2, 4, 6))
    message = r"packed for kernels 'reference' and these are 'cpu': pack it with pack_weight of the same Ops"
    with pytest.raises(ValueError, match=f"batched_linear: the weight is {message}"):
        CPU_OPS.batched_linear(torch.ones(3, 2, 6), w)
    packed = CPU_OPS.pack_weight(torch.ones(1, 8, 6))
    with pytest.raises(ValueError, match="experts_mlp: the weight is packed for kernels 'cpu'"):
        REFERENCE_OPS.experts_mlp(torch.ones(1, 6), torch.tensor([1]), packed, packed)


def test_what_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown: Backend = "cuda"  # type: ignore[assignment]
    with pytest.raises(ValueError, match="choose one of cpu, triton, reference"):
        Ops(unknown)
    with pytest.raises(ValueError, match="take the place of kernels 'triton', not of 'cpu'"):
        Ops("cpu", ["deep_gemm"])
    monkeypatch.setattr("shoal.kernels.registry.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install triton"):
        Ops("triton")


def test_kernels_follow_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert Ops.choose(cpu).backend == "cpu"
    assert choose_backend("auto", gpu) == "triton"
    assert choose_backend("reference", gpu) == "reference"
    with pytest.raises(ValueError, match='kernels "cpu" do not run on a GPU'):
        choose_backend("cpu", gpu)
    with pytest.raises(ValueError, match='kernels "triton" need device "cuda"'):
        Ops.choose(cpu, "triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device cuda: torch .*; set device to cpu"):
        Ops.choose(gpu)


@pytest.fixture
def other_settings() -> Iterator[None]:
    """Settings of a host program that differ from an engine's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    torch.set_float32_matmul_precision("medium")
    torch.set_flush_denormal(True)
    yield
    torch.set_num_threads(threads)
    set_deterministic_fp_mode()


def product_of_a_subnormal() -> float:
    return (torch.tensor([2.0**-133]) * 1.0).item()


@pytest.mark.usefixtures("other_settings")
def test_the_fp_mode_fixes_what_it_reports() -> None:
    mode = set_deterministic_fp_mode()
    assert torch.get_float32_matmul_precision() == mode["float32_matmul_precision"] == "highest"
    assert product_of_a_subnormal() == 2.0**-133
    assert mode["flush_denormal"] is False
    assert json.loads(json.dumps(mode)) == set_deterministic_fp_mode()


@pytest.mark.usefixtures("other_settings")
def test_torch_settings_are_those_of_the_host_after_a_block_that_failed() -> None:
    def fail() -> None:
        with torch_settings(2):
            assert torch.get_num_threads() == 2
            assert torch.get_float32_matmul_precision() == "highest"
            assert product_of_a_subnormal() == 2.0**-133
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_num_threads() == 3
    assert torch.get_float32_matmul_precision() == "medium"
    assert product_of_a_subnormal() == 0.0


def test_unlike_gpus_have_unlike_numerics(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    ids = []
    for capability in ((8, 0), (8, 9), (9, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        ids.append(REFERENCE_OPS.numerics_id(gpu))
    assert ids == ["reference+sm_80", "reference+sm_89", "reference+sm_90", "reference+sm_90"]
    assert CPU_OPS.numerics_id(torch.device("cpu")) == "cpu"


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_a_triton_without_gluon_keeps_the_other_kernels() -> None:
    program = (
        "import os, sys; os.environ['TRITON_INTERPRET'] = '1'; sys.modules['triton.experimental.gluon'] = None; "
        "from shoal.kernels.ops import Ops; Ops('triton')"
    )
    subprocess.run([sys.executable, "-c", program], timeout=600, check=True)
