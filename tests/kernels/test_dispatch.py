"""Both implementations put the same bytes in the same places; a small case is worked out by hand."""

from __future__ import annotations

import struct

import pytest
import torch
from torch import Tensor

from shoal.kernels.ops import Ops
from tests.support.ops import CPU_OPS


def random_case(
    num_tokens: int, top_k: int, num_experts: int, num_ranks: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """x (not contiguous), topk_idx with some -1, the rank and slot of every expert, the slots of a rank."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, 14, generator=generator).to(dtype)[:, 1:8]
    topk_idx = torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)[:, :top_k]
    topk_idx = topk_idx.masked_fill(torch.rand(num_tokens, top_k, generator=generator) < 0.2, -1)
    place = torch.randperm(num_experts, generator=generator)
    return x, topk_idx, place % num_ranks, place // num_ranks, -(-num_experts // num_ranks)


def test_send_buffers_by_hand() -> None:
    x = torch.tensor([[1.0], [2.0]])
    topk_idx = torch.tensor(
        [[2, 0], [1, -1]]
    )  # expert 0: rank 1, slot 0 | expert 1: rank 0, slot 0 | 2: rank 1, slot 1
    send_buffers, num_pairs, row_of = CPU_OPS.pack_send_buffers(
        x, topk_idx, torch.tensor([1, 0, 1]), torch.tensor([0, 0, 1]), 2
    )
    assert [bytes(s.numpy()) for s in send_buffers] == [
        struct.pack("=iiiif", 1, 1, 0, 0, 2.0),
        struct.pack("=iiiiiif", 1, 2, 0, 0, 1, 0, 1.0),  # token 0 goes once, for slots 1 and 0
    ]
    assert num_pairs == [1, 2]
    assert row_of.tolist() == [[1, 2], [0, -1]]
    rows, x_row, counts, arrival, received = CPU_OPS.unpack_recv_buffers([send_buffers[1], send_buffers[0]], x, 2)
    assert rows.tolist() == [[1], [2]]
    assert x_row.tolist() == [0, 1, 0]
    assert counts.tolist() == [2, 1]
    assert arrival.tolist() == [1, 2, 0]  # slot 0: the second pair of the first sender, the other's; slot 1: the first
    assert received == [2, 1]
    rows, x_row, counts, arrival, received = CPU_OPS.unpack_recv_buffers([send_buffers[1], send_buffers[1]], x, 2)
    assert rows[x_row].tolist() == [[1], [1], [1], [1]]
    assert counts.tolist() == [2, 2]
    assert arrival.tolist() == [1, 3, 0, 2]  # slot 0: the second pair of each sender, then slot 1: the first
    assert received == [2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts", "num_ranks"), [(0, 2, 4, 2), (1, 1, 1, 3), (37, 4, 9, 4)]
)
def test_cpu_and_reference_agree(
    num_tokens: int, top_k: int, num_experts: int, num_ranks: int, dtype: torch.dtype
) -> None:
    x, topk_idx, rank_of, slot_of, num_slots = random_case(num_tokens, top_k, num_experts, num_ranks, dtype, seed=3)
    found = []
    for backend in ("cpu", "reference"):
        ops = Ops(backend)
        token_of, counts, row_of = ops.permute_by_expert(topk_idx, rank_of * num_slots + slot_of, num_ranks * num_slots)
        send_buffers, num_pairs, sent_row_of = ops.pack_send_buffers(x, topk_idx, rank_of, slot_of, num_ranks)
        rows, x_row, slot_counts, arrival, received = ops.unpack_recv_buffers(send_buffers, x, num_slots)
        tensors = [token_of, counts, row_of, *send_buffers, sent_row_of, rows, x_row, slot_counts, arrival]
        found.append((tensors, num_pairs, received))
    (tensors, *lists), (expected, *expected_lists) = found
    assert lists == expected_lists
    assert [t.dtype for t in tensors] == [t.dtype for t in expected]
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


def test_a_buffer_of_another_width_is_found() -> None:
    x, topk_idx, rank_of, slot_of, num_slots = random_case(5, 2, 4, 2, torch.float32, seed=4)
    send_buffers, _, _ = CPU_OPS.pack_send_buffers(x, topk_idx, rank_of, slot_of, 2)
    with pytest.raises(AssertionError, match="rank 0 sent"):
        CPU_OPS.unpack_recv_buffers(send_buffers, x[:, :3], num_slots)


@pytest.mark.parametrize(("row", "slot"), [(1, 0), (-1, 0), (0, 2), (0, -1)])
def test_a_pair_that_names_no_row_or_slot_is_found(row: int, slot: int) -> None:
    buffer = torch.frombuffer(bytearray(struct.pack("=iiiif", 1, 1, row, slot, 5.0)), dtype=torch.uint8)
    with pytest.raises(AssertionError, match="names a row"):
        CPU_OPS.unpack_recv_buffers([buffer], torch.empty(0, 1), 2)
