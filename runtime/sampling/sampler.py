"""Logits to token ids: each row by itself, ties broken by token id, every random number a function of the row.

Numpy works on one contiguous row at a time, so that a row's bits cannot depend on the batch or on threads.
Order within a row, as in vLLM: log-probabilities of the raw logits; then the mask of structured outputs, logit bias,
min_tokens mask, repetition, frequency and presence penalties, temperature, min_p, top_k, top_p; then inversion of the
cumulative distribution.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.kernels.philox import uniforms

from ..structured.constraint import ConstraintError, TokenConstraint
from ..structured.token_mask import to_bools
from ..types import Logprob, SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingRow:
    """Everything except the logits that decides the next token of one sample."""

    params: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    seed: int
    """The result of `resolve_seed`."""
    sample_index: int = 0
    """Position among the `n` samples of the request."""
    eos_token_ids: Sequence[int] = ()
    """Masked, like the stop token ids, before `min_tokens` output tokens; without effect under `ignore_eos`."""
    constraint: TokenConstraint | None = None
    """Masks tokens, those that end the answer included."""


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The next token of a row, or the reason why it has none."""

    token_id: int
    """-1 where `error` is set."""
    logprobs: dict[int, Logprob] | None = None
    """The token first, then the most likely ones in order of rank; None where they were not asked for."""
    error: str | None = None

    @property
    def logprob(self) -> float | None:
        return None if self.logprobs is None else self.logprobs[self.token_id].logprob

    @property
    def rank(self) -> int | None:
        return None if self.logprobs is None else self.logprobs[self.token_id].rank


def resolve_seed(params_seed: int | None, run_seed: int, request_index: int) -> int:
    """The row's own seed, or one of 63 bits derived from the run's seed and the row's index."""
    if params_seed is not None:
        return params_seed
    digest = hashlib.sha256(f"shoal seed {run_seed} {request_index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True, slots=True)
class Sampling:
    """The next tokens of some rows, possibly still being computed."""

    finish: Callable[[], list[SampledToken]]
    """Wait for the tokens."""
    token_ids: Tensor | None = None
    """[N] int64 on the device of the logits, for a caller that needs no more; None where `finish` reads the logits."""


class Sampler:
    """Chooses tokens. Its only state is the vocabulary size."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def begin(self, logits: torch.Tensor, rows: Sequence[SamplingRow], *, ahead: int = 0) -> Sampling:
        """`sample`, with `ahead` output tokens per row that are not known yet; here it runs in `finish`."""
        assert ahead == 0, "the tokens before these are not known"
        return Sampling(partial(self.sample, logits, rows))

    def sample(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """The next token of each row; `logits` is [len(rows), vocab_size] float32.

        Greedy rows take the highest logit, of equal ones the lowest id. A row whose logits contain NaN or +Inf, or only
        -Inf, or whose constraint fails, gets an `error`; the others are unaffected.
        """
        matrix = self._matrix(logits, len(rows))
        best = matrix.argmax(axis=1)  # the first NaN, or else the first maximum
        draws = _draws(rows)
        with np.errstate(
            over="ignore"
        ):  # an overflow to -Inf is a probability of 0; one to +Inf becomes the row's error
            return [
                _sample_row(raw, top, row, draw)
                for raw, top, row, draw in zip(matrix, best.tolist(), rows, draws, strict=True)
            ]

    def prompt_logprobs(self, logits: torch.Tensor, next_token_ids: Sequence[int], k: int) -> list[SampledToken]:
        """Score given tokens: row i of `logits` [n, vocab_size] float32 predicts `next_token_ids[i]`.

        Each answer holds the log-probability and rank of that token and of the k most likely ones, or an `error`.
        """
        matrix = self._matrix(logits, len(next_token_ids))
        best = matrix.argmax(axis=1)
        with np.errstate(over="ignore"):
            return [
                _score_row(raw, top, token_id, k)
                for raw, top, token_id in zip(matrix, best.tolist(), next_token_ids, strict=True)
            ]

    def _matrix(self, logits: torch.Tensor, num_rows: int) -> NDArray[np.float32]:
        assert logits.shape == (num_rows, self.vocab_size), (tuple(logits.shape), num_rows, self.vocab_size)
        assert logits.dtype == torch.float32
        matrix: NDArray[np.float32] = logits.detach().cpu().contiguous().numpy()
        return matrix


def _draws(rows: Sequence[SamplingRow]) -> list[float]:
    """The random number of each row's next token; greedy rows need none."""
    sampled = [(i, row) for i, row in enumerate(rows) if not row.params.greedy]
    draws = [0.0] * len(rows)
    if sampled:
        positions = [len(row.output_token_ids) for _, row in sampled]
        drawn = uniforms([row.seed for _, row in sampled], positions, [row.sample_index for _, row in sampled])
        for (i, _), draw in zip(sampled, drawn.tolist(), strict=True):
            draws[i] = draw
    return draws


def _sample_row(raw: NDArray[np.float32], best: int, row: SamplingRow, draw: float) -> SampledToken:
    params = row.params
    if error := _logits_error(raw[best]):
        return SampledToken(-1, error=error)
    if params.logit_bias and max(params.logit_bias) >= len(raw):
        return SampledToken(-1, error=f"logit_bias names token {max(params.logit_bias)}, the vocabulary has {len(raw)}")
    try:
        logits = _adjust(raw, row)
    except ConstraintError as error:
        return SampledToken(-1, error=str(error))
    token_id = best if logits is raw else int(logits.argmax())
    if not np.isfinite(logits[token_id]):
        masks = "logit_bias, min_tokens" if row.constraint is None else "structured_outputs, logit_bias"
        return SampledToken(-1, error=f"{masks} and the penalties leave no token with a finite logit")
    if not params.greedy:
        token_id = _draw(logits, logits[token_id], params, draw)
    if params.logprobs is None:
        return SampledToken(token_id)
    return SampledToken(token_id, _logprobs(raw, raw[best], token_id, params.logprobs))


def _score_row(raw: NDArray[np.float32], best: int, token_id: int, k: int) -> SampledToken:
    if error := _logits_error(raw[best]):
        return SampledToken(-1, error=error)
    return SampledToken(token_id, _logprobs(raw, raw[best], token_id, k))


def _logits_error(highest: np.float32) -> str | None:
    """Error of a row of logits, read from the value at its argmax, which is NaN if any logit is; None if it is fine."""
    if np.isfinite(highest):
        return None
    if highest == -np.inf:
        return "the model's logits are all -Inf"
    return f"the model's logits contain {'NaN' if np.isnan(highest) else '+Inf'}"


def _adjust(raw: NDArray[np.float32], row: SamplingRow) -> NDArray[np.float32]:
    """Bias, mask and penalties in float32: a new array, or `raw` itself if nothing is to be done."""
    params = row.params
    allowed = None if row.constraint is None else row.constraint.mask(row.output_token_ids)
    masked = _ending_token_ids(row, len(raw)) if len(row.output_token_ids) < params.min_tokens else []
    repeats = params.repetition_penalty != 1.0
    counts = bool(params.frequency_penalty or params.presence_penalty) and len(row.output_token_ids) > 0
    if not (params.logit_bias or masked or repeats or counts or allowed is not None):
        return raw
    logits = raw.copy() if allowed is None else np.where(to_bools(allowed, len(raw)), raw, np.float32(-np.inf))
    if params.logit_bias:
        logits[list(params.logit_bias)] += np.array(list(params.logit_bias.values()), dtype=np.float32)
    logits[masked] = -np.inf
    if repeats:
        seen = np.unique(np.array([*row.prompt_token_ids, *row.output_token_ids], dtype=np.int64))
        penalty = np.float32(params.repetition_penalty)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    if counts:
        ids, times = np.unique(np.array(row.output_token_ids, dtype=np.int64), return_counts=True)
        logits[ids] -= np.float32(params.frequency_penalty) * times.astype(np.float32)
        logits[ids] -= np.float32(params.presence_penalty)
    return logits


def _ending_token_ids(row: SamplingRow, vocab_size: int) -> list[int]:
    if row.constraint is not None:
        return []  # it knows where the answer may end
    ends = [*(row.params.stop_token_ids or ()), *(() if row.params.ignore_eos else row.eos_token_ids)]
    return [i for i in ends if i < vocab_size]


def _draw(logits: NDArray[np.float32], highest: np.float32, params: SamplingParams, draw: float) -> int:
    """Truncate and sample; weights and sums are float64, the cumulative distribution runs in order of token id.

    top_k keeps the first k by (logit descending, id ascending); min_p those at least min_p times as likely as the
    likeliest; top_p, of what is left, the shortest beginning by (probability descending, id ascending) that reaches it.
    """
    ids: NDArray[np.int64] | None = None  # of `weights`; None: all, in order
    if 0 < params.top_k < len(logits):
        ids = _top_ids(logits, params.top_k)
        logits = logits[ids]
    # Highest minus highest is 0 before the division, so no temperature overflows.
    weights = np.exp((logits - highest).astype(np.float64) / params.temperature)
    if params.min_p > 0.0:
        ids, weights = _keep(ids, weights, np.flatnonzero(weights >= params.min_p))
    if params.top_p < 1.0:
        ids, weights = _keep(ids, weights, _nucleus(weights, params.top_p))
    cumulative = weights.cumsum()
    # draw <= 1 - 2**-53, so the product is below the total and the search ends at a token with a weight.
    chosen = int(cumulative.searchsorted(draw * cumulative[-1], side="right"))
    return chosen if ids is None else int(ids[chosen])


def _keep(
    ids: NDArray[np.int64] | None, weights: NDArray[np.float64], kept: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    return (kept if ids is None else ids[kept]), weights[kept]


def _nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Indices, ascending, of the fewest largest weights (ties: lower index) whose sum reaches top_p of the total."""
    total = weights.sum()
    # Everything below this bound together weighs less than half of what top_p cuts away, so it need not be sorted.
    candidates = np.flatnonzero(weights >= 0.5 * (1.0 - top_p) * total / len(weights))
    descending = np.sort(weights[candidates])[::-1]
    num_kept = min(int(descending.cumsum().searchsorted(top_p * total, side="left")) + 1, len(descending))
    return _first_ids(weights, descending[num_kept - 1], num_kept)


def _top_ids(values: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Indices, ascending, of the k largest values; of equal ones the lower index."""
    return _first_ids(values, np.partition(values, len(values) - k)[len(values) - k], k)


def _first_ids(values: NDArray[np.floating], threshold: np.floating, count: int) -> NDArray[np.int64]:
    """The first `count` indices by (value descending, index ascending), sorted; `threshold` is the last one's value."""
    reaching = np.flatnonzero(values >= threshold)
    surplus = len(reaching) - count
    if surplus:
        ties = np.flatnonzero(values[reaching] == threshold)
        reaching = np.delete(reaching, ties[len(ties) - surplus :])
    return reaching


def _logprobs(raw: NDArray[np.float32], highest: np.float32, token_id: int, k: int) -> dict[int, Logprob]:
    """log_softmax of the raw logits at the token and at the k most likely ones.

    (logit - highest) - log(sum(exp(logit - highest))): float32, with the sum in float64. Rank orders by (logit
    descending, id ascending).
    """
    shifted = raw - highest
    log_sum = np.float32(np.log(np.exp(shifted).sum(dtype=np.float64)))
    best = _top_ids(raw, min(k, len(raw))) if k else np.empty(0, dtype=np.int64)
    best = best[np.argsort(-raw[best], kind="stable")]
    rank = 1 + int((raw > raw[token_id]).sum()) + int((raw[:token_id] == raw[token_id]).sum())
    logprobs = {token_id: Logprob(float(shifted[token_id] - log_sum), rank)}
    for i, other in enumerate(best.tolist()):
        logprobs.setdefault(other, Logprob(float(shifted[other] - log_sum), i + 1))
    return logprobs
