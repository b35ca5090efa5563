"""int4 matrices of compressed-tensors, unpacked as by hand, and their headers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoal.runtime.checkpoint.checkpoint import Checkpoint
from shoal.runtime.checkpoint.compressed_tensors import Int4Groups
from shoal.runtime.checkpoint.int4_groups import quantize_int4
from shoal.runtime.random_checkpoint import make_checkpoint, random_tensor

IN_GROUPS_OF_8 = Int4Groups(group_size=8, targets=("Linear",), ignore=(), prefix="")
IN_GROUPS_OF_32 = Int4Groups(group_size=32, targets=("Linear",), ignore=(), prefix="")


def int32(*words: int) -> Tensor:
    """Words of 32 bits, given unsigned."""
    return torch.tensor(words, dtype=torch.uint32).view(torch.int32)


# Hexadecimal digits from right to left are columns from left to right; a digit d is the value d - 8.
BY_HAND: dict[str, Tensor] = {
    "w.weight_packed": torch.stack([int32(0xFEBA9810, 0x88888889), int32(0x76543210, 0xFFFFFFF0)]),
    "w.weight_scale": torch.tensor([[1.0, 0.5], [2.0, 0.25]], dtype=torch.bfloat16),
    "w.weight_shape": torch.tensor([2, 16]),
}
VALUES = [
    [-8, -7, 0, 1, 2, 3, 6, 7, 0.5, 0, 0, 0, 0, 0, 0, 0],
    [-16, -14, -12, -10, -8, -6, -4, -2, -2, 1.75, 1.75, 1.75, 1.75, 1.75, 1.75, 1.75],
]


def saved(model_dir: Path, changes: Mapping[str, Tensor | None] | None = None) -> Checkpoint:
    """A checkpoint of `BY_HAND`; None in `changes` removes a tensor."""
    tensors = {name: tensor for name, tensor in {**BY_HAND, **(changes or {})}.items() if tensor is not None}
    save_file(tensors, model_dir / "model.safetensors")
    return Checkpoint(model_dir)


def test_values_by_hand(tmp_path: Path) -> None:
    with saved(tmp_path) as checkpoint:
        assert (checkpoint.shape("w.weight"), checkpoint.dtype("w.weight")) == ((2, 16), torch.int32)
        whole = checkpoint.read("w.weight")
        assert whole.dtype == torch.bfloat16
        assert whole.tolist() == VALUES
        for rows in (slice(0, 2), slice(1, 2), slice(1, 1)):
            for cols in (slice(0, 16), slice(3, 13), slice(8, 9), slice(15, 16), slice(8, 8)):
                part = checkpoint.read("w.weight", rows=rows, cols=cols, dtype=torch.float32)
                assert part.tolist() == [row[cols] for row in VALUES[rows]]
                assert part.is_contiguous()
        assert checkpoint.check_names({"w.weight": (2, 16)}, IN_GROUPS_OF_8) == []


def test_values_are_rounded_once_in_the_dtype_of_the_scales(tmp_path: Path) -> None:
    # 7 * 1.0078125 = 7.0546875, between the bfloat16 numbers 7.03125 and 7.0625, and nearer to the latter.
    packed = int32(*[0xFFFFFFFF] * 2).reshape(1, 2)
    shape = torch.tensor([1, 16], dtype=torch.int32)
    for dtype, expected in ((torch.bfloat16, 7.0625), (torch.float32, 7.0546875)):
        scale = torch.full((1, 2), 1.0078125, dtype=dtype)
        changes = {"w.weight_packed": packed, "w.weight_scale": scale, "w.weight_shape": shape}
        with saved(tmp_path, changes) as checkpoint:
            assert checkpoint.read("w.weight").dtype == dtype
            assert checkpoint.read("w.weight", dtype=torch.float32).tolist() == [[expected] * 16]
            assert checkpoint.read("w.weight", dtype=torch.bfloat16).tolist() == [[7.0625] * 16]


def test_quantised_by_hand() -> None:
    # The largest magnitudes, 14 and 3.5, become 7 or -7 with the scales 2 and 0.5.
    values = torch.tensor([[14.0, -14, 2, 0, -2, 4, 6, -6, -3.5, 0.5, 0, 0, 0, 0, 0, 0]])
    packed, scales = quantize_int4(values, 8, torch.bfloat16)
    assert scales.tolist() == [[2.0, 0.5]]
    assert packed.tolist() == int32(0x5BA7891F, 0x88888891).reshape(1, 2).tolist()


def test_a_random_checkpoint_is_near_what_it_was_made_of(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "kimi_k2", int4=True, num_shards=3)
    name = "model.layers.2.mlp.experts.15.down_proj.weight"
    with Checkpoint(tmp_path) as checkpoint:
        values = checkpoint.read(name, dtype=torch.float32)
        assert checkpoint.dtype("model.layers.2.mlp.shared_experts.down_proj.weight") == torch.float32
    expected = random_tensor(name, (96, 48), 0)
    largest = expected.view(96, 3, 16).abs().amax(dim=-1, keepdim=True).expand(-1, -1, 16).reshape(96, 48)
    # half a step of a seventh of the largest, and 1/256 for each rounding of a value or scale to bfloat16
    assert torch.all((values - expected).abs() <= largest / 14 + largest / 128)
    assert not torch.equal(values, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w.weight_scale": None}, r"w\.weight_packed needs w\.weight_scale, which is not in the checkpoint"),
        ({"w.weight_shape": None}, r"w\.weight_packed needs w\.weight_shape, which is not in the checkpoint"),
        ({"w.weight_packed": torch.zeros(2, 2)}, r"w\.weight_packed is torch\.float32 \[2, 2\], expected an int32"),
        (
            {"w.weight_packed": torch.zeros(4).int()},
            r"w\.weight_packed is torch\.int32 \[4\], expected an int32 matrix",
        ),
        ({"w.weight_scale": torch.ones(3, 2)}, r"w\.weight_scale is torch\.float32 \[3, 2\], .* \[2, groups\]"),
        ({"w.weight_scale": torch.ones(2, 3)}, r"w\.weight_scale is .*groups of equal size, .*w\.weight \[2, 16\]"),
        ({"w.weight_scale": torch.ones(2, 4)}, "groups of equal size, a multiple of 8"),
        ({"w.weight_scale": torch.ones(2, 0)}, "groups of equal size"),
        ({"w.weight_scale": torch.ones(4)}, r"w\.weight_scale is torch\.float32 \[4\]"),
        ({"w.weight_scale": torch.ones(2, 2).half()}, r"w\.weight_scale is torch\.float16 .*bfloat16 or float32"),
        ({"w.weight_shape": torch.ones(3).int()}, r"w\.weight_shape is torch\.int32 \[3\], expected"),
        ({"w.weight_shape": torch.ones(2)}, r"w\.weight_shape is torch\.float32 \[2\], expected int32 or int64 \[2\]"),
        ({"w.weight_zero_point": torch.zeros(1, 2).int()}, r"zero points .* in w\.weight_zero_point"),
        ({"w.weight_g_idx": torch.zeros(16).int()}, r"a group for each column .* in w\.weight_g_idx"),
    ],
)
def test_tensors_that_do_not_belong_together(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    checkpoint = saved(tmp_path, changes)
    with pytest.raises(ValueError, match=message):
        checkpoint.read("w.weight")
    with pytest.raises(ValueError, match=message):
        checkpoint.check_names({"w.weight": (2, 16)}, IN_GROUPS_OF_8)


def test_the_stored_shape_is_compared_when_a_matrix_is_read(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, {"w.weight_shape": torch.tensor([2, 15])})
    with pytest.raises(ValueError, match=r"w\.weight_shape says \[2, 15\], but w\.weight_packed holds \[2, 16\]"):
        checkpoint.read("w.weight", rows=slice(0, 1))


@pytest.mark.parametrize(
    ("changes", "shape", "int4", "message"),
    [
        ({}, (2, 24), IN_GROUPS_OF_8, r"w\.weight is \[2, 16\], expected \[2, 24\]$"),
        ({}, (2, 16), IN_GROUPS_OF_32, r"w\.weight_scale is \[2, 2\], .*groups of 8 for w\.weight .* is 32"),
        ({}, (2, 16), None, r"w\.weight_packed is quantised .*, but by .* w\.weight is not"),
        (
            {"w.weight_packed": None, "w.weight": torch.zeros(2, 16)},
            (2, 16),
            IN_GROUPS_OF_8,
            r"w\.weight is stored unquantised, but by targets and ignore of quantization_config it is int4",
        ),
        ({"w.weight_packed": None}, (2, 16), IN_GROUPS_OF_8, r"lacks 1 of 1 tensors of the model: w\.weight_packed"),
    ],
)
def test_headers_against_the_configuration(
    tmp_path: Path, changes: dict[str, Any], shape: tuple[int, ...], int4: Int4Groups | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        saved(tmp_path, changes).check_names({"w.weight": shape}, int4)


def test_an_int4_checkpoint_lacks_other_tensors(tmp_path: Path) -> None:
    """The int4 matrices are no explanation of what is missing."""
    with pytest.raises(ValueError, match=r"lacks 1 of 2 tensors of the model: norm\.weight$"):
        saved(tmp_path).check_names({"w.weight": (2, 16), "norm.weight": (16,)}, IN_GROUPS_OF_8)


def test_every_tensor_of_an_int4_checkpoint_counts_in_the_fingerprint(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "kimi_k25", int4=True, overrides={"num_hidden_layers": 2, "n_routed_experts": 4})
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert {name.rsplit(".")[-1] for name in tensors} >= {"weight_packed", "weight_scale", "weight_shape"}
    seen = set()
    for name in ["", *tensors]:
        changed = {other: tensor.clone() for other, tensor in tensors.items()}
        if name:
            changed[name].view(torch.uint8).view(-1)[0] ^= 1
        save_file(changed, file)
        with Checkpoint(tmp_path) as checkpoint:
            seen.add(checkpoint.compute_fingerprint())
    assert len(seen) == 1 + len(tensors)
