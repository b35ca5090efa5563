"""Requests as the router sees them: what is known of each, what it takes of a group, and which one is worth moving."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shoal.kernels.math_utils import round_up
from shoal.parallel.request_id import RequestId
from shoal.runtime.request_limits import max_output_tokens
from shoal.runtime.response import ResponseAssembler
from shoal.runtime.types import GeneratedTokens, Request

from .groups import GroupState, Share
from .prefixes import prefix_hashes

MAX_MOVES = 1
"""How often a request may be moved to a group that has less to do."""
MOVE_GAIN = 2
"""A running request is moved if those that stay expect this many times the tokens that must be computed again."""


@dataclass(slots=True)
class TrackedRequest:
    """A request that is not finished."""

    request: Request
    request_id: str
    n: int
    num_prompt_tokens: int
    arrival: int
    block_size: int
    """Tokens per KV cache block; a sequence takes whole blocks."""
    max_output_tokens: int
    """Upper bound for every sample, in tokens."""
    prefixes: list[int]
    response: ResponseAssembler
    """The answer so far."""
    num_kv_tokens: int
    """Cache that all samples take, with their known tokens and one more each, if they share nothing."""
    attempt: int = 0
    num_moves: int = 0
    prefill: int | None = None
    """The group that computes the prompt, or holds its KV cache until it was read."""
    decode: int | None = None
    """The group that finishes the request."""
    announced: bool = False
    """The decode group knows of the request."""
    prefilled: bool = False
    """The prefill group is done."""
    loaded: bool = False
    """The decode group no longer waits for the KV cache."""
    recomputing: bool = False
    """It was moved while it was running and has no new token yet."""

    @classmethod
    def new(cls, request: Request, *, arrival: int, max_model_len: int, block_size: int) -> TrackedRequest:
        n = request.params.n
        num_prompt = len(request.prompt_token_ids)
        response = ResponseAssembler(request)
        num_known = [response.num_known_tokens(i) for i in range(n)]
        return cls(
            request=request,
            request_id=request.request_id,
            n=n,
            num_prompt_tokens=num_prompt,
            arrival=arrival,
            block_size=block_size,
            max_output_tokens=max(0, max_output_tokens(request, max_model_len)),
            prefixes=prefix_hashes(request.prompt_token_ids),
            response=response,
            num_kv_tokens=sum([round_up(num_prompt + count + 1, block_size) for count in num_known]),
        )

    def grow(self, num_before: int, num_after: int) -> int:
        """Account for new tokens of a sample; returns the cache that they take."""
        start = self.num_prompt_tokens + 1
        more = round_up(start + num_after, self.block_size) - round_up(start + num_before, self.block_size)
        self.num_kv_tokens += more
        return more

    def begin_again(self) -> None:
        """Start the next attempt, with no group; the answer so far is kept."""
        self.attempt += 1
        self.prefill = self.decode = None
        self.announced = self.prefilled = self.loaded = self.recomputing = False

    @property
    def attempt_id(self) -> RequestId:
        return RequestId(self.request_id, self.attempt)

    @property
    def known(self) -> tuple[GeneratedTokens, ...]:
        """The answer so far, for an engine that goes on from there; empty if there is nothing."""
        return self.response.generated() if self.num_known_tokens else ()

    @property
    def num_known_tokens(self) -> int:
        return sum([self.response.num_known_tokens(i) for i in range(self.n)])

    @property
    def num_tokens_left(self) -> int:
        """Upper bound of the tokens that are still to be generated."""
        return self.n * self.max_output_tokens - self.num_known_tokens

    @property
    def num_tokens_expected(self) -> int:
        """A guess at the tokens that are still to be generated: as many again as there are."""
        return min(self.num_tokens_left, self.num_known_tokens)

    @property
    def num_tokens_again(self) -> int:
        """Tokens that another group must compute before it can go on with the request."""
        return self.num_prompt_tokens + self.num_known_tokens

    @property
    def unsplit(self) -> bool:
        """Whether one group computes both the prompt and the answer."""
        return self.prefill is None and not self.announced

    @property
    def scores_prompt(self) -> bool:
        """Whether logprobs of the prompt are wanted, which only the group has that computes it."""
        return self.request.params.prompt_logprobs is not None

    @property
    def can_split(self) -> bool:
        """Whether two groups may share it: not where logprobs of the prompt were lost between two groups before."""
        return self.attempt == 0 or not self.scores_prompt

    @property
    def needs_prefill(self) -> bool:
        """Whether the decode group cannot go on alone."""
        return not self.prefilled and (not self.announced or self.scores_prompt)

    def needs_no_less_than(self, other: TrackedRequest) -> bool:
        """Whether it needs at least as much room, so that, as a rule, it finds none where the other one did not."""
        return self.num_kv_tokens >= other.num_kv_tokens and self.n >= other.n

    @property
    def prompt_share(self) -> Share:
        """The share of a prefill group: the prompt, and one token of every sample."""
        n, num_prompt = self.n, self.num_prompt_tokens
        return Share(n, num_prompt, n * round_up(num_prompt + 1, self.block_size), hands_over=True)

    @property
    def answer_share(self) -> Share:
        """The share of a decode group: what follows a prompt that is computed elsewhere."""
        n = self.n
        return Share(n, n * self.max_output_tokens, self.num_kv_tokens)

    @property
    def whole_share(self) -> Share:
        """The share of a group that does it all."""
        n = self.n
        return Share(n, self.num_prompt_tokens + n * self.max_output_tokens, self.num_kv_tokens)

    def share_of(self, group: int) -> Share:
        """The share of a group that has the request now."""
        if group == self.prefill:
            return self.prompt_share
        return self.whole_share if self.unsplit else self.answer_share


def pick_to_move(
    group: int, state: GroupState, tracked: Mapping[str, TrackedRequest]
) -> tuple[TrackedRequest, bool] | None:
    """The request to migrate off this group, and whether it is already running.

    That is the last request that only waits; else the running one with most tokens ahead, if moving it relieves the
    others by more than it costs.
    """
    waiting: list[TrackedRequest] = []
    running: list[TrackedRequest] = []
    num_seqs = 0
    for request_id, share in state.requests.items():
        one = tracked[request_id]
        num_seqs += share.num_seqs
        if one.prefill == group:
            if not one.announced:
                waiting.append(one)
        elif one.prefill is None or one.prefilled:
            has_place = not one.unsplit or num_seqs <= state.spec.max_num_seqs
            (running if has_place else waiting).append(one)
    movable = [one for one in waiting if one.num_moves < MAX_MOVES]
    if movable:
        return movable[-1], False
    expected = sum([one.num_tokens_expected for one in running])
    movable = [
        one
        for one in running
        if one.num_moves < MAX_MOVES
        and one.request.report != "step"  # a stream would stand still for whoever reads it
        and one.num_tokens_left > one.num_tokens_again
        and expected - one.num_tokens_expected > MOVE_GAIN * one.num_tokens_again
    ]
    return (max(movable, key=lambda one: one.num_tokens_left - one.num_tokens_again), True) if movable else None
