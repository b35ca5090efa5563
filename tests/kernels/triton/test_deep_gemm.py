"""DeepGEMM's kernels in place of Triton's: with its surface as a fake, and with the library where it and a GPU are."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from shoal.kernels.attention import PagedLayout
from shoal.kernels.kv_format import FP8_CACHE, read_index_keys
from shoal.kernels.linear import PackedWeight
from shoal.kernels.ops import Ops
from shoal.kernels.quant import quantize_block_fp8
from shoal.kernels.registry import check_vendors
from shoal.kernels.rope import RopeTable
from shoal.kernels.vendor.deep_gemm import check_experts, check_index, check_scales, experts_mlp_deep_gemm, place_rows
from tests.kernels.triton.interpreter import DEVICE, TRITON_OPS
from tests.kernels.triton.paging import to_device
from tests.support.fakes.install import install
from tests.support.ops import CPU_OPS, REFERENCE_OPS

HIDDEN, INNER = 256, 128
COUNTS = [3, 0, 20, 16, 1]


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        install(monkeypatch, "deep_gemm")
    elif find_spec("deep_gemm") is None:
        pytest.skip("DeepGEMM is not installed")


def weights(ops: Ops, experts: int, *, ue8m0: bool, device: str) -> tuple[PackedWeight, PackedWeight]:
    generator = torch.Generator().manual_seed(1)
    packed = []
    for shape in ((2 * INNER, HIDDEN), (HIDDEN, INNER)):
        stored = [quantize_block_fp8(torch.randn(*shape, generator=generator) / 8) for _ in range(experts)]
        values, scales = (torch.stack(list(parts)).to(device) for parts in zip(*stored, strict=True))
        if ue8m0:
            scales = scales.log2().ceil().exp2()
        packed.append(ops.pack_block_fp8(values, scales, ue8m0=ue8m0))
    return packed[0], packed[1]


def run(
    x: Tensor, counts: list[int], x_row: Tensor | None, out_row: Tensor | None, *, ue8m0: bool, reference: bool
) -> Tensor:
    device = "cpu" if reference else DEVICE
    rows = [None if row is None else row.to(device) for row in (x_row, out_row)]
    ops = REFERENCE_OPS if reference else Ops("triton", ["deep_gemm"])
    packed = weights(ops, len(counts), ue8m0=ue8m0, device=device)
    return ops.experts_mlp(x.to(device), torch.tensor(counts, device=device), *packed, *rows).cpu()


@pytest.mark.parametrize(("ue8m0", "gathered"), [(False, False), (True, True)])
def test_experts_match_the_reference(ue8m0: bool, gathered: bool) -> None:
    num_rows = sum(COUNTS)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(21 if gathered else num_rows, HIDDEN, generator=generator).bfloat16()
    x_row = torch.randint(len(x), (num_rows,), generator=generator) if gathered else None
    out_row = torch.randperm(num_rows, generator=generator) if gathered else None
    expected = run(x, COUNTS, x_row, out_row, ue8m0=ue8m0, reference=True)
    got = run(x, COUNTS, x_row, out_row, ue8m0=ue8m0, reference=False)
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def test_rows_that_no_expert_has_change_nothing() -> None:
    """On a GPU there are as many rows as there could be, and those after the last expert's mean nothing."""
    x = torch.randn(30, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    few = run(x[:7], [3, 4], None, None, ue8m0=False, reference=False)
    x_row = torch.arange(7 + 20).clamp_max(29)
    device = torch.device(DEVICE)
    packed = weights(TRITON_OPS, 2, ue8m0=False, device=DEVICE)
    counts = torch.tensor([3, 4])
    # not through `experts_mlp`, where counts in host memory must sum to the rows
    many = experts_mlp_deep_gemm(x.to(device), counts.to(device), *packed, x_row.to(device), None).cpu()
    assert torch.equal(many[:7], few)


def test_no_rows() -> None:
    x = torch.empty(0, HIDDEN, dtype=torch.bfloat16)
    assert run(x, [0, 0], None, None, ue8m0=False, reference=False).shape == (0, HIDDEN)


def test_rows_of_an_expert_begin_a_tile() -> None:
    place, layout = place_rows(torch.tensor([3, 0, 5, 1]), 11, 4)
    #     e0: rows 0 1 2 | e2: rows 4 .. 8 | e3: row 12 | two pairs of no expert share the row after the last tile
    assert place.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 12, 20, 20]
    assert layout.tolist() == [0, 0, 0, -1, 2, 2, 2, 2, 2, -1, -1, -1, 3, *[-1] * 11]
    assert layout.dtype == torch.int32


def test_the_tiles_are_enough_however_pairs_are_spread() -> None:
    for counts in ([1, 1, 1, 1, 1, 1], [6, 0, 0, 0, 0, 0], [5, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 6], [2, 2, 2, 0, 0, 0]):
        place, layout = place_rows(torch.tensor(counts), 6, 4)
        assert len(layout) == 28
        assert int(place.max()) < 24
        assert layout[place].tolist() == [expert for expert, count in enumerate(counts) for _ in range(count)]


def index_inputs(tokens: int, lengths: list[int], heads: int = 32) -> tuple[Tensor, Tensor, Tensor, PagedLayout]:
    """The last `tokens` tokens of each sequence, and pages of FP8 keys in an order that is not theirs."""
    generator = torch.Generator().manual_seed(0)
    blocks = max(-(-length // 64) for length in lengths) + 1
    tables = torch.randperm(len(lengths) * blocks, generator=generator).view(-1, blocks).int()
    pages = torch.zeros(tables.numel(), 64 * 132, dtype=FP8_CACHE)
    slots = torch.arange(tables.numel() * 64)
    k = torch.randn(len(slots), 128, generator=generator).bfloat16()
    angles = torch.cat([torch.ones(1, 32), torch.zeros(1, 32)], dim=1)
    norm = (torch.ones(128), torch.zeros(128))
    CPU_OPS.write_index_keys(pages, slots, k, norm, 1e-6, RopeTable(angles, torch.zeros_like(slots), False))
    positions = torch.cat([torch.arange(length - tokens, length) for length in lengths])
    bounds = torch.arange(0, len(positions) + 1, tokens, dtype=torch.int32)
    q = torch.randn(len(positions), heads, 128, generator=generator).bfloat16()
    weights = torch.rand(len(positions), heads, generator=generator)
    return q, weights, pages, PagedLayout(tables, bounds, positions, 64)


def test_the_best_positions_are_those_of_the_reference() -> None:
    q, weights, pages, layout = index_inputs(1, [300, 5, 130])
    ops = Ops("triton", ["deep_gemm"])
    selected = ops.index_topk(q.to(DEVICE), weights.to(DEVICE), pages.to(DEVICE), to_device(layout, DEVICE), 40).cpu()
    assert selected[1].tolist() == [*range(5), *[-1] * 35]
    for t, length in ((0, 300), (2, 130)):
        keys = read_index_keys(pages, layout.slots(t, torch.arange(length)), 128, torch.bfloat16)
        scores = REFERENCE_OPS.index_scores(q[t : t + 1], weights[t : t + 1], keys)[0]
        chosen = selected[t].long()
        assert (chosen[1:] > chosen[:-1]).all()
        rest = torch.ones(length, dtype=torch.bool).index_fill(0, chosen, False)
        # FP8 queries move a score by a few per cent, and so may exchange neighbours at the edge
        assert scores[chosen].min() > scores[rest].max() - 0.05 * scores.max()


def test_prompts_and_wider_keys_are_left_to_triton() -> None:
    q, weights, pages, layout = index_inputs(3, [130, 70])
    wide = torch.randn(len(pages), 64 * 128).bfloat16()
    q, weights, layout = q.to(DEVICE), weights.to(DEVICE), to_device(layout, DEVICE)
    for keys in (pages.to(DEVICE), wide.to(DEVICE)):
        expected = TRITON_OPS.index_topk(q, weights, keys, layout, 20)
        ops = Ops("triton", ["deep_gemm"])
        assert torch.equal(ops.index_topk(q, weights, keys, layout, 20), expected)


def test_indexers_that_it_does_not_score() -> None:
    check_index(64, 128, 64)
    for heads, dim, page_size in ((16, 128, 64), (64, 64, 64), (64, 128, 16)):
        with pytest.raises(ValueError, match=f"32 or 64, not with {page_size}, {dim} and {heads}"):
            check_index(heads, dim, page_size)


def test_scales_that_a_device_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    check_scales(torch.device("cuda"), ue8m0=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 0))
    check_scales(torch.device("cuda"), ue8m0=True)
    with pytest.raises(ValueError, match="scales that are powers of two"):
        check_scales(torch.device("cuda"), ue8m0=False)


def test_the_library_is_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no kernel image is available")

    check_vendors(["deep_gemm"], torch.device(DEVICE))
    monkeypatch.setattr("deep_gemm.m_grouped_fp8_gemm_nt_contiguous", fails)
    with pytest.raises(ValueError, match=f"deep_gemm: the library does not run on {DEVICE}: no kernel image"):
        check_vendors(["deep_gemm"], torch.device(DEVICE))
    monkeypatch.delattr("deep_gemm.m_grouped_fp8_gemm_nt_contiguous")
    with pytest.raises(
        ValueError, match="installed deep_gemm has no m_grouped_fp8_gemm_nt_contiguous; build a newer one"
    ):
        check_vendors(["deep_gemm"], torch.device(DEVICE))


def test_weights_that_it_does_not_multiply_by() -> None:
    check_experts(7168, 2048, is_block_aligned=True)
    with pytest.raises(ValueError, match="hidden_size 7168, experts of 2000 and FP8 weights"):
        check_experts(7168, 2000, is_block_aligned=True)
    ops = Ops("triton", ["deep_gemm"])
    w = ops.pack_weight(torch.ones(1, 2 * INNER, HIDDEN, dtype=torch.bfloat16, device=DEVICE))
    down = ops.pack_weight(torch.ones(1, HIDDEN, INNER, dtype=torch.bfloat16, device=DEVICE))
    x = torch.ones(1, HIDDEN, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(ValueError, match="and other weights"):
        ops.experts_mlp(x, torch.tensor([1]), w, down)
