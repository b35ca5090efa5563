"""FlashMLA's kernels in place of Triton's: with its surface as a fake, and with the library where it and a GPU are."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from shoal.kernels.kv_format import FP8_CACHE
from shoal.kernels.ops import Ops
from shoal.kernels.registry import check_vendors
from shoal.kernels.rope import RopeTable
from shoal.kernels.vendor.flash_mla import check_attention, padded_heads
from tests.kernels.triton.interpreter import DEVICE
from tests.kernels.triton.paging import Sequences, random_selection, to_device
from tests.support.fakes.install import install
from tests.support.ops import CPU_OPS, REFERENCE_OPS

LENGTHS = [70, 1, 150, 300]
SPANS = [(69, 70), (0, 1), (148, 150), (299, 300)]
POSITIONS = torch.tensor([69, 0, 148, 149, 299])
PAGE = 64


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        install(monkeypatch, "flash_mla")
    elif find_spec("flash_mla") is None:
        pytest.skip("FlashMLA is not installed")


def attend(
    queries: Tensor, kv_cache: Tensor, sequences: Sequences, selected: Tensor | None, *, reference: bool
) -> Tensor:
    _, _, _, layout = sequences.span(SPANS, block_size=PAGE)
    device = "cpu" if reference else DEVICE
    queries = queries.to(device)
    ops = REFERENCE_OPS if reference else Ops("triton", ["flash_mla"])
    return ops.mla_attention(
        queries[..., :512],
        queries[..., 512:],
        kv_cache.to(device),
        to_device(layout, device),
        0.06,
        selected=None if selected is None else selected.to(device),
    ).cpu()


def assert_parity(queries: Tensor, kv_cache: Tensor, sequences: Sequences, selected: Tensor | None) -> None:
    expected = attend(queries, kv_cache, sequences, selected, reference=True)
    got = attend(queries, kv_cache, sequences, selected, reference=False)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)


def in_fp8(kv_cache: Tensor) -> Tensor:
    """The same entries, 656 bytes each; norm and rotation are those of ones and of an angle of 0."""
    stored = torch.zeros(len(kv_cache), 656, dtype=FP8_CACHE)
    table = torch.cat([torch.ones(1, 32), torch.zeros(1, 32)], dim=1)
    slots = torch.arange(len(kv_cache))
    kv = kv_cache[:, :576].nan_to_num(0.0)
    CPU_OPS.write_latents(stored, slots, kv, torch.ones(512), 1e-6, RopeTable(table, torch.zeros_like(slots), True))
    return stored


@pytest.mark.parametrize("heads", [3, 64, 65])
def test_sparse_attention_matches_the_reference(heads: int) -> None:
    sequences = Sequences(LENGTHS, torch.bfloat16, heads=heads, latent=512, rope=64)
    queries, _, kv_cache, _ = sequences.span(SPANS, block_size=PAGE)
    for topk in (130, 256):
        assert_parity(queries, kv_cache, sequences, random_selection(POSITIONS, topk))


def test_sparse_attention_over_fp8_entries_matches_the_reference() -> None:
    sequences = Sequences(LENGTHS, torch.bfloat16, heads=5, latent=512, rope=64)
    queries, _, kv_cache, _ = sequences.span(SPANS, block_size=PAGE)
    assert_parity(queries, in_fp8(kv_cache), sequences, random_selection(POSITIONS, 200))


def test_attention_to_all_positions_matches_the_reference() -> None:
    sequences = Sequences(LENGTHS, torch.bfloat16, heads=5, latent=512, rope=64)
    queries, _, kv_cache, _ = sequences.span(SPANS, block_size=PAGE)
    assert_parity(queries, kv_cache, sequences, None)


def test_no_tokens() -> None:
    sequences = Sequences([3], torch.bfloat16, heads=5, latent=512, rope=64)
    queries, _, kv_cache, layout = sequences.span([(3, 3)], block_size=PAGE)
    ops = Ops("triton", ["flash_mla"])
    out = ops.mla_attention(queries[..., :512], queries[..., 512:], kv_cache, to_device(layout, DEVICE), 0.06)
    assert out.shape == (0, 5, 512)


def test_the_library_is_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no kernel image is available")

    check_vendors(["flash_mla"], torch.device(DEVICE))
    monkeypatch.setattr("flash_mla.flash_mla_sparse_fwd", fails)
    with pytest.raises(ValueError, match=f"flash_mla: the library does not run on {DEVICE}: no kernel image"):
        check_vendors(["flash_mla"], torch.device(DEVICE))
    monkeypatch.delattr("flash_mla.flash_mla_sparse_fwd")
    with pytest.raises(ValueError, match="installed flash_mla has no flash_mla_sparse_fwd; build a newer one"):
        check_vendors(["flash_mla"], torch.device(DEVICE))


def test_heads_that_kernels_exist_for() -> None:
    assert [padded_heads(heads) for heads in (1, 16, 64, 65, 128)] == [64, 64, 64, 128, 128]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dtype": torch.float32}, "attends in bfloat16 .*, not in torch.float32"),
        ({"dims": (512, 32)}, "not in torch.bfloat16 with 512, 32 and 16"),
        ({"num_heads": 129}, "up to 128 heads on a rank"),
        ({"fp8": True, "sparse": False}, "reads an FP8 cache where attention is sparse"),
        ({"sparse": False, "page_size": 32}, "with block_size 64, not 32"),
    ],
)
def test_what_it_has_no_kernel_for(changes: dict[str, object], says: str) -> None:
    accepted = {"dtype": torch.bfloat16, "dims": (512, 64), "num_heads": 16}
    accepted |= {"fp8": False, "sparse": True, "page_size": 16}
    check_attention(**accepted)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=says):
        check_attention(**(accepted | changes))  # type: ignore[arg-type]
