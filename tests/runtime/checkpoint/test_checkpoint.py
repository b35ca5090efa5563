"""Slices, FP8 blocks and checks of a checkpoint's tensors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from shoal.runtime.checkpoint.checkpoint import Checkpoint
from shoal.runtime.models.families import read_config
from shoal.runtime.random_checkpoint import make_checkpoint, random_tensor, tensor_shapes

PROJECTION = "model.layers.0.mlp.gate_proj.weight"


def test_reads_rows_columns_and_dtypes(tmp_path: Path) -> None:
    matrix = torch.arange(60, dtype=torch.float32).view(10, 6)
    save_file({"w": matrix, "b": torch.arange(4.0), "s": torch.tensor(3.0)}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.names == ["b", "s", "w"]
        assert checkpoint.shape("w") == (10, 6)
        assert checkpoint.dtype("w") == torch.float32
        assert "w" in checkpoint
        assert "x" not in checkpoint
        part = checkpoint.read("w", rows=slice(2, 5), cols=slice(1, 4))
        whole = checkpoint.read("w", dtype=torch.bfloat16)
        assert checkpoint.read("s").item() == 3.0
        assert checkpoint.read("b", rows=slice(1, 3)).tolist() == [1.0, 2.0]
        assert checkpoint.read("w", rows=slice(4, 4)).shape == (0, 6)
        assert torch.equal(checkpoint.read("w", cols=slice(5, None)), matrix[:, 5:])
    # By hand: row 2 starts at 12, so columns 1 to 3 of rows 2, 3, 4 are these.
    assert part.tolist() == [[13.0, 14.0, 15.0], [19.0, 20.0, 21.0], [25.0, 26.0, 27.0]]
    assert part.is_contiguous()
    assert whole.dtype == torch.bfloat16
    assert torch.equal(whole.float(), matrix)


@pytest.mark.parametrize("rows", [slice(0, 11), slice(-1, 3), slice(5, 2), slice(0, 10, 2)])
def test_refuses_rows_outside_the_tensor(tmp_path: Path, rows: slice) -> None:
    save_file({"w": torch.zeros(10, 6), "b": torch.zeros(3)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(ValueError, match="w has shape \\[10, 6\\]; rows"):
        checkpoint.read("w", rows=rows)
    with pytest.raises(ValueError, match="no cols"):
        checkpoint.read("b", cols=slice(0, 1))
    with pytest.raises(ValueError, match="has no tensor absent"):
        checkpoint.read("absent")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dimension", ["rows", "cols"])
def test_memory_holds_the_slice_and_nothing_else(tmp_path: Path, dimension: str) -> None:
    save_file({"w": torch.arange(4096 * 4096).view(4096, 4096).float()}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins again
    before = _memory_bytes("VmHWM")
    cut = slice(1024, 1536)
    part = checkpoint.read("w", rows=cut) if dimension == "rows" else checkpoint.read("w", cols=cut)
    num_bytes = 512 * 4096 * 4
    assert part.untyped_storage().nbytes() == num_bytes
    # columns are cut from pieces of the matrix, of which one is in memory at a time
    assert _memory_bytes("VmHWM") - before <= num_bytes + (16 << 20) + (4 << 20)
    checkpoint.close()
    first = int(part[0, 0])
    assert part.shape == ((512, 4096) if dimension == "rows" else (4096, 512))
    assert first == (1024 * 4096 if dimension == "rows" else 1024)
    assert int(part[-1, -1]) == first + (512 * 4096 - 1 if dimension == "rows" else 4095 * 4096 + 511)


def _memory_bytes(field: str) -> int:
    """A size of this process in /proc/self/status, such as VmHWM."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


def test_fp8_by_hand(tmp_path: Path) -> None:
    # 130 x 129: four blocks, of 128 x 128, 128 x 1, 2 x 128 and 2 x 1. Ones and twos times the block's scale.
    weight = torch.ones(130, 129)
    weight[129, 128] = 2.0
    scale = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    save_file({"w": weight.to(torch.float8_e4m3fn), "w_scale_inv": scale}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        corner = checkpoint.read("w", rows=slice(126, 130), cols=slice(127, 129), dtype=torch.float32)
        assert corner.tolist() == [[1.0, 10.0], [1.0, 10.0], [100.0, 1000.0], [100.0, 2000.0]]
        assert checkpoint.read("w").dtype == torch.bfloat16
        assert checkpoint.read("w", rows=slice(129, 130), cols=slice(128, 129), dtype=torch.float32).tolist() == [
            [2000.0]
        ]


def test_fp8_slices_equal_the_whole(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, fp8=True, overrides={"intermediate_size": 400, "hidden_size": 272})
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.dtype(PROJECTION) == torch.float8_e4m3fn
        whole = checkpoint.read(PROJECTION, dtype=torch.float32)
        expected = random_tensor(PROJECTION, (400, 272), 0)
        # e4m3 keeps 3 bits after the leading one: at most 1/16 of the value, or half the smallest step of the block.
        assert torch.all((whole - expected).abs() <= expected.abs() / 16 + expected.abs().max() / 448 * 2**-9)
        for rows in (slice(0, 400), slice(100, 300), slice(128, 256), slice(399, 400)):
            for cols in (slice(0, 272), slice(100, 140), slice(256, 272)):
                part = checkpoint.read(PROJECTION, rows=rows, cols=cols, dtype=torch.float32)
                assert torch.equal(part, whole[rows, cols])


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (None, "scales, w_scale_inv, are not in"),
        (torch.ones(1, 2), r"expected float32 \[2, 2\]"),
        (torch.ones(2, 2).int(), "int32"),
    ],
)
def test_refuses_fp8_without_its_scales(tmp_path: Path, scale: Tensor | None, message: str) -> None:
    tensors = {"w": torch.ones(130, 129).to(torch.float8_e4m3fn)} | ({} if scale is None else {"w_scale_inv": scale})
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(ValueError, match=message):
        checkpoint.read("w")
    with pytest.raises(ValueError, match=message):
        checkpoint.check_names({"w": (130, 129)})


def test_shards_hold_the_same_tensors(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "one")
    make_checkpoint(tmp_path / "many", num_shards=3)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) == 3
    with Checkpoint(tmp_path / "one") as one, Checkpoint(tmp_path / "many") as many:
        assert one.names == many.names
        assert all(torch.equal(one.read(name), many.read(name)) for name in one.names)


def test_check_names(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v32", fp8=True, mtp=True)
    config = read_config(tmp_path)
    expected = tensor_shapes(config)
    checkpoint = Checkpoint(tmp_path)
    leftover = checkpoint.check_names(expected)
    assert leftover == checkpoint.mtp_names(config.num_hidden_layers, config.num_nextn_predict_layers)
    assert "model.layers.3.eh_proj.weight" in leftover
    assert all(name.startswith("model.layers.3.") for name in leftover)
    with pytest.raises(
        ValueError, match=r"lacks 7 of \d+ tensors of the model: extra.0, extra.1, extra.2, extra.3, extra.4, \.\.\."
    ):
        checkpoint.check_names(expected | {f"extra.{i}": (1,) for i in range(7)})
    with pytest.raises(ValueError, match=r"1 tensors .*model.norm.weight is \[96\], expected \[97\]"):
        checkpoint.check_names(expected | {"model.norm.weight": (97,)})


def test_check_names_ignores_rotary_tables_and_reports_the_rest(tmp_path: Path) -> None:
    tensors = {
        "w": torch.zeros(2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2),
        "other": torch.zeros(2),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert Checkpoint(tmp_path).check_names({"w": (2,)}) == ["other"]
    save_file({"w": torch.zeros(2, dtype=torch.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"w is stored as torch\.int32"):
        Checkpoint(tmp_path).check_names({"w": (2,)})


def test_file_replaced_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(4)}, path)
    changed, cut, gone = Checkpoint(tmp_path), Checkpoint(tmp_path), Checkpoint(tmp_path)
    path.unlink()
    save_file({"w": torch.zeros(5)}, path)
    with pytest.raises(ValueError, match="w changed since the checkpoint was opened"):
        changed.read("w")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="w changed since the checkpoint was opened"):
        cut.read("w")
    path.unlink()
    with pytest.raises(ValueError, match=r"model.safetensors: w cannot be read \(.*No such file"):
        gone.read("w")
