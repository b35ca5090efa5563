"""Attention in Triton: parity with the reference, and bits that depend on a row's own list only."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from shoal.kernels.triton.attention import mla_options
from tests.kernels.triton.interpreter import DEVICE, TRITON_OPS
from tests.kernels.triton.paging import Sequences, random_selection, to_device
from tests.support.ops import REFERENCE_OPS

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2}
SPLITS = "shoal.kernels.triton.attention.SPLIT_KEYS"
MODEL = {"heads": 5, "latent": 512, "rope": 64}


def attend(
    sequences: Sequences,
    spans: list[tuple[int, int]],
    *,
    block_size: int = 16,
    seed: int = 0,
    spare_blocks: int = 1,
    selected: Tensor | None = None,
    reference: bool = False,
) -> Tensor:
    queries, _, kv_cache, layout = sequences.span(spans, block_size=block_size, seed=seed, spare_blocks=spare_blocks)
    device = "cpu" if reference else DEVICE
    queries = queries.to(device)
    ops = REFERENCE_OPS if reference else TRITON_OPS
    return ops.mla_attention(
        queries[..., : sequences.latent],
        queries[..., sequences.latent :],
        kv_cache.to(device),
        to_device(layout, device),
        0.17,
        selected=None if selected is None else selected.to(device),
    ).cpu()


def test_small_shared_memory_takes_fewer_heads_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    card = mla_options(torch.bfloat16, (8, 6), 99 << 10, fp8=False)
    assert card == {"BLOCK_HEADS": 32, "BLOCK_KEYS": 32, "STAGES": 2, "num_warps": 8}
    assert mla_options(torch.bfloat16, (8, 0), 163 << 10, fp8=False)["BLOCK_HEADS"] == 64
    monkeypatch.setattr("shoal.kernels.triton.attention.mla_options", lambda *_, **__: card)
    sequences = Sequences([40, 9], torch.bfloat16, heads=34, latent=64, rope=16)
    spans = [(39, 40), (8, 9)]
    found, expected = attend(sequences, spans), attend(sequences, spans, reference=True)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "latent", "rope"), [(1, 16, 16), (3, 40, 8), (65, 32, 4), (5, 512, 64)])
@pytest.mark.parametrize("split_keys", [64, 2048])
def test_matches_the_reference(
    dtype: torch.dtype, heads: int, latent: int, rope: int, split_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SPLITS, split_keys)
    torch.manual_seed(0)
    sequences = Sequences([70, 1, 150, 9], dtype, heads=heads, latent=latent, rope=rope)
    spans = [(69, 70), (0, 1), (148, 150), (4, 4)]
    dense = attend(sequences, spans)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(dense, attend(sequences, spans, reference=True), rtol=tolerance, atol=tolerance)
    selected = random_selection(torch.tensor([69, 0, 148, 149]), 130)
    sparse = attend(sequences, spans, selected=selected)
    expected = attend(sequences, spans, selected=selected, reference=True)
    torch.testing.assert_close(sparse, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_company_chunks_blocks_and_splits_without_keys_change_no_bit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SPLITS, 64)
    sequences = Sequences([135, 1, 66], dtype, **MODEL)
    together = attend(sequences, [(120, 135), (0, 1), (60, 66)])
    chunks = [attend(sequences, [(a, b), (0, 0), (0, 0)]) for a, b in ((120, 121), (121, 128), (128, 135))]
    assert torch.equal(torch.cat(chunks), together[:15])
    alone = attend(sequences, [(0, 0), (0, 0), (65, 66)], block_size=4, seed=3, spare_blocks=40)
    assert torch.equal(alone[0], together[-1])
    monkeypatch.setattr("shoal.kernels.triton.attention.MAX_PARTIAL_BYTES", 1)
    assert torch.equal(attend(sequences, [(134, 135), (0, 1), (64, 66)])[[0, 1, -1]], together[[14, 15, -1]])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("split_keys", [64, 2048])
def test_selecting_everything_is_dense_attention(
    dtype: torch.dtype, split_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SPLITS, split_keys)
    sequences = Sequences([140], dtype, **MODEL)
    every = torch.arange(150).expand(5, 150).int()
    selected = every.where(every <= torch.arange(135, 140)[:, None], -1)
    dense = attend(sequences, [(135, 140)])
    assert torch.equal(attend(sequences, [(135, 140)], selected=selected), dense)


def test_heads_are_independent() -> None:
    sequences = Sequences([67], torch.bfloat16, heads=130, latent=512, rope=64)
    whole = attend(sequences, [(66, 67)])
    sequences.queries = [sequences.queries[0][:, 100:103]]
    assert torch.equal(attend(sequences, [(66, 67)]), whole[:, 100:103])


@pytest.mark.parametrize("latent", [40, 512])
def test_later_nan_keys_are_invisible_and_a_missing_slot_is_nan(latent: int) -> None:
    sequences = Sequences([80], torch.bfloat16, latent=latent, rope=64)
    whole = attend(sequences, [(70, 80)])
    sequences.keys[0][77:] = math.nan
    poisoned = attend(sequences, [(70, 80)])
    assert torch.equal(poisoned[:7], whole[:7])
    assert poisoned[7:].isnan().all()

    queries, _, kv_cache, layout = sequences.span([(40, 50)], spare_blocks=0)
    kv_cache = torch.cat([kv_cache, torch.zeros_like(kv_cache)])[: len(kv_cache)]  # what lies beyond would not be NaN
    layout.block_tables[0, 3] = len(kv_cache) // 16  # position 48 and later
    layout.positions[-1] = 1000
    queries = queries.to(DEVICE)
    out = TRITON_OPS.mla_attention(
        queries[..., :latent], queries[..., latent:], kv_cache.to(DEVICE), to_device(layout, DEVICE), 0.17
    )
    assert out.flatten(1).isnan().all(1).tolist() == [False] * 8 + [True] * 2
    assert not out[:8].isnan().any()


@pytest.mark.parametrize("latent", [40, 512])
def test_one_key_returns_its_latent_and_an_empty_list_zero(latent: int) -> None:
    sequences = Sequences([5], torch.bfloat16, latent=latent, rope=64)
    selected = torch.tensor([[3, -1], [-1, -1]], dtype=torch.int32)
    sparse = attend(sequences, [(3, 5)], selected=selected)
    assert torch.equal(sparse[0], sequences.keys[0][3, :latent].expand(3, latent))
    assert torch.equal(sparse[1], torch.zeros(3, latent, dtype=torch.bfloat16))
    assert attend(sequences, [(5, 5)]).shape == (0, 3, latent)


def _fp8_cache(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """bf16 kv_cache [n, >= 576] -> FP8 kv_cache [n, 656] and what they hold in bf16, [n, 576]."""
    groups = kv_cache[:, :512].float().nan_to_num().view(-1, 4, 128)
    scale = torch.exp2((groups.abs().amax(2).clamp_min(1e-4) / 448).log2().ceil())
    codes = (groups / scale[..., None]).to(torch.float8_e4m3fn)
    held = torch.cat([(codes.float() * scale[..., None]).bfloat16().view(-1, 512), kv_cache[:, 512:576]], dim=1)
    parts = (codes.view(-1, 512).view(torch.uint8), scale.view(torch.uint8), kv_cache[:, 512:576].contiguous())
    return torch.cat([part.view(torch.uint8) for part in parts], dim=1), held


@pytest.mark.parametrize("sparse", [False, True])
def test_fp8_entries_count_as_what_they_hold(sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SPLITS, 64)
    sequences = Sequences([90, 20], torch.bfloat16, **MODEL)
    queries, _, kv_cache, layout = sequences.span([(87, 90), (0, 2)])
    fp8, held = _fp8_cache(kv_cache)
    assert fp8.shape[1] == 656
    fp8 = torch.cat([fp8, torch.full((len(fp8), 144), 127, dtype=torch.uint8)], dim=1)  # padded
    selected = random_selection(layout.positions, 70) if sparse else None
    q_latent, q_rope = queries[..., :512], queries[..., 512:]
    out = TRITON_OPS.mla_attention(
        q_latent.to(DEVICE),
        q_rope.to(DEVICE),
        fp8.to(DEVICE),
        to_device(layout, DEVICE),
        0.1,
        selected=None if selected is None else selected.to(DEVICE),
    )
    expected = REFERENCE_OPS.mla_attention(q_latent, q_rope, held, layout, 0.1, selected=selected)
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-2, atol=1e-2)


def test_fp8_entries_that_are_not_aligned_are_refused() -> None:
    queries, _, _, layout = Sequences([9], torch.bfloat16, **MODEL).span([(8, 9)])
    with pytest.raises(ValueError, match="multiples of 16 bytes, these are 788 apart"):
        TRITON_OPS.mla_attention(
            queries[..., :512], queries[..., 512:], torch.zeros(16, 788, dtype=torch.uint8), layout, 0.1
        )


def test_fp8_entries_refuse_what_does_not_fit() -> None:
    sequences = Sequences([9], torch.bfloat16, **MODEL)
    queries, _, _, layout = sequences.span([(8, 9)])
    q_latent, q_rope = queries[..., :512], queries[..., 512:]
    with pytest.raises(ValueError, match="needs bfloat16 queries"):
        TRITON_OPS.mla_attention(q_latent[..., :64], q_rope, torch.zeros(16, 656, dtype=torch.uint8), layout, 0.1)
