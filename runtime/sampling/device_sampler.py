"""Sampling on the device, for rows whose parameters the kernels support; the host samples the others.

The two round differently, so a row's parameters alone decide which of them samples it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from shoal.kernels.ops import Ops

from ..structured.constraint import ConstraintError
from ..structured.token_mask import full_mask
from ..types import Logprob, SamplingParams
from .sampler import SampledToken, Sampler, Sampling, SamplingRow

_BAD_LOGITS = "the model's logits contain NaN or +Inf, or are all -Inf"
_BAD_MASKED_LOGITS = f"{_BAD_LOGITS} where structured_outputs allow a token"


class DeviceSampler(Sampler):
    """A sampler that returns before the device has chosen the tokens."""

    def __init__(self, vocab_size: int, device: torch.device, ops: Ops) -> None:
        super().__init__(vocab_size)
        self._device = device
        self._ops = ops

    def begin(self, logits: Tensor, rows: Sequence[SamplingRow], *, ahead: int = 0) -> Sampling:
        """Queue the kernels and the copies of their results. Rows that need only tokens do not read the logits again.

        `ahead`: number of output tokens before these that are not known yet.
        """
        on_host = [i for i, row in enumerate(rows) if not _kernels_know(row.params)]
        if len(on_host) == len(rows):
            return super().begin(logits, rows, ahead=ahead)
        assert logits.shape == (len(rows), self.vocab_size), (tuple(logits.shape), len(rows), self.vocab_size)
        floats, integers = self._parameters(rows, ahead)
        temperatures, top_p, min_p = floats
        seeds, positions, sample_indices, top_k = integers
        allowed, failed = self._masked(logits, rows)
        if any(_truncates(row.params) for row in rows):
            allowed = self._ops.truncate_logits(allowed, temperatures, top_k, top_p, min_p)
        token_ids = self._ops.sample_tokens(allowed, temperatures, seeds, positions, sample_indices)
        results = [token_ids]
        asked = [row.params.logprobs for row in rows if row.params.logprobs is not None]
        if asked:
            scored = torch.cat([token_ids.unsqueeze(1), self._likeliest(logits, max(asked))], dim=1)
            results += [scored, *self._ops.token_logprobs(logits, scored)]
        copies = [_to_host(result) for result in results]
        copied: torch.cuda.Event | None = None
        if self._device.type == "cuda":
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        constrained = any(row.constraint is not None for row in rows)
        assert not (ahead and (on_host or constrained)), "the host needs the logits, or the tokens before these"
        finish = partial(self._finish, copied, copies, logits, list(rows), on_host, failed)
        return Sampling(finish, None if on_host or constrained else token_ids)

    def _masked(self, logits: Tensor, rows: Sequence[SamplingRow]) -> tuple[Tensor, dict[int, str]]:
        """The logits of the tokens that constraints allow, and why constraints failed, per row that this samples."""
        constrained = [
            (i, row) for i, row in enumerate(rows) if row.constraint is not None and _kernels_know(row.params)
        ]
        if not constrained:
            return logits, {}
        failed: dict[int, str] = {}
        masks = np.tile(full_mask(self.vocab_size), (len(rows), 1))
        for i, row in constrained:
            assert row.constraint is not None
            try:
                masks[i] = row.constraint.mask(row.output_token_ids)
            except ConstraintError as error:
                failed[i] = str(error)
        bitmask = self._to_device(torch.from_numpy(masks.view(np.int32)))
        return self._ops.mask_logits(logits, bitmask), failed

    def _likeliest(self, logits: Tensor, count: int) -> Tensor:
        """[N, count] int64, by id."""
        if not count:
            return torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)
        lengths = torch.full((len(logits),), self.vocab_size, device=logits.device)
        return self._ops.topk_positions(logits, lengths, min(count, self.vocab_size)).long()

    def _parameters(self, rows: Sequence[SamplingRow], ahead: int) -> tuple[Tensor, Tensor]:
        """[3, N] float32 and [4, N] int64 on the device; a row that the host samples is greedy here."""
        params = [row.params for row in rows]
        floats = np.array(
            [
                [p.temperature if _kernels_know(p) else 0.0 for p in params],
                [p.top_p for p in params],
                [p.min_p for p in params],
            ],
            np.float32,
        )
        integers = np.array(
            [
                [row.seed for row in rows],
                [len(row.output_token_ids) + ahead for row in rows],
                [row.sample_index for row in rows],
                [max(0, p.top_k) for p in params],
            ],
            np.int64,
        )
        return self._to_device(torch.from_numpy(floats)), self._to_device(torch.from_numpy(integers))

    def _to_device(self, values: Tensor) -> Tensor:
        return values if self._device.type == "cpu" else values.pin_memory().to(self._device, non_blocking=True)

    def _finish(
        self,
        copied: torch.cuda.Event | None,
        copies: list[Tensor],
        logits: Tensor,
        rows: list[SamplingRow],
        on_host: list[int],
        failed: dict[int, str],
    ) -> list[SampledToken]:
        if copied is not None:
            copied.synchronize()
        token_ids, *scores = (copy.tolist() for copy in copies)
        sampled = [
            SampledToken(i)
            if i >= 0
            else SampledToken(-1, error=_BAD_LOGITS if row.constraint is None else _BAD_MASKED_LOGITS)
            for i, row in zip(token_ids, rows, strict=True)
        ]
        for i, row in enumerate(rows):
            if row.params.logprobs is not None and token_ids[i] >= 0:
                logprobs = _by_rank(row.params.logprobs, *(score[i] for score in scores))
                sampled[i] = SampledToken(token_ids[i], logprobs)
        for i, error in failed.items():
            sampled[i] = SampledToken(-1, error=error)
        if on_host:
            chosen = self.sample(logits[on_host], [rows[i] for i in on_host])
            for i, token in zip(on_host, chosen, strict=True):
                sampled[i] = token
        return sampled


def _by_rank(k: int, scored: list[int], logprobs: list[float], rank: int) -> dict[int, Logprob]:
    """The first token with its rank, then the k likeliest of the others, which come by id."""
    found = {scored[0]: Logprob(logprobs[0], rank)}
    # stable, so that of equal ones the lower id is first
    likeliest = sorted(range(1, len(scored)), key=lambda j: -logprobs[j])[:k]
    for place, j in enumerate(likeliest):
        found.setdefault(scored[j], Logprob(logprobs[j], place + 1))
    return found


def _kernels_know(params: SamplingParams) -> bool:
    """Whether nothing is asked for that changes logits, or keeps tokens from being chosen, by what came before."""
    penalties = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
    return not (penalties or params.logit_bias or params.min_tokens)


def _truncates(params: SamplingParams) -> bool:
    return not params.greedy and (params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0)


def _to_host(values: Tensor) -> Tensor:
    """A copy that is complete once the device has come so far."""
    if values.is_cpu:
        return values
    return torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
