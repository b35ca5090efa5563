from __future__ import annotations

import json

import pytest
import torch

from shoal.kernels.numerics import pin_floating_point
from shoal.kernels.registry import (
    Backend,
    current_backend,
    implementation,
    is_invariant,
    register,
    set_backend,
    use_backend,
)


def test_the_default_backend_is_the_invariant_one() -> None:
    assert current_backend() == "cpu"
    assert is_invariant("cpu")
    assert is_invariant("triton")
    assert not is_invariant("reference")


def test_use_backend_restores_the_previous_one_after_an_error() -> None:
    def fail_on_reference() -> None:
        with use_backend("reference"):
            assert current_backend() == "reference"
            with use_backend("cpu"):
                assert current_backend() == "cpu"
            assert current_backend() == "reference"
            raise KeyError

    with pytest.raises(KeyError):
        fail_on_reference()
    assert current_backend() == "cpu"


def test_an_op_runs_on_the_backend_in_force() -> None:
    @register("test_registry_op", "cpu")
    def on_cpu() -> str:
        return "cpu"

    @register("test_registry_op", "reference")
    def on_reference() -> str:
        return "reference"

    assert implementation("test_registry_op")() == "cpu"
    assert implementation("test_registry_op", "reference")() == "reference"
    with use_backend("reference"):
        assert implementation("test_registry_op")() == "reference"


def test_an_unknown_backend_is_refused() -> None:
    unknown: Backend = "cuda"  # type: ignore[assignment]
    with pytest.raises(ValueError, match="choose one of cpu, reference"):
        set_backend(unknown)
    assert current_backend() == "cpu"


def test_triton_kernels_need_the_triton_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.kernels.registry.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install triton"):
        set_backend("triton")
    assert current_backend() == "cpu"


def test_pin_floating_point_fixes_what_it_reports() -> None:
    torch.set_float32_matmul_precision("medium")
    torch.set_flush_denormal(True)
    pinned = pin_floating_point()
    assert torch.get_float32_matmul_precision() == pinned["float32_matmul_precision"] == "highest"
    assert (torch.tensor([2.0**-133]) * 1.0).item() == 2.0**-133
    assert pinned["flush_denormal"] is False
    assert json.loads(json.dumps(pinned)) == pin_floating_point()
