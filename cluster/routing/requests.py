"""Requests as the router sees them: what is known of each, what it takes of a group, and which one is worth moving."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shoal.runtime.request_limits import max_output_tokens
from shoal.runtime.types import GeneratedTokens, Request, RequestOutput

from .groups import Group, Share
from .prefixes import prefix_hashes

MAX_MOVES = 1
"""Times that a request is moved to a group that has less to do."""
MOVE_GAIN = 2
"""A begun request is moved if those that stay expect so many times the tokens that are computed again."""


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
    """Longest output of each continuation, in tokens."""
    prefixes: list[int]
    generated: list[GeneratedTokens]
    num_kv_tokens: int
    """What all continuations take of a cache, with what is known of them and a token more each, sharing nothing."""
    num_shown_tokens: list[int]
    """Per continuation, what whoever asked has seen of a streaming request."""
    attempt: int = 0
    num_moves: int = 0
    prefill: int | None = None
    """The group that computes the prompt, or holds its records until they were read."""
    decode: int | None = None
    announced: bool = False
    """The decode group knows of the request."""
    prefilled: RequestOutput | None = None
    """What the prefill group told at its end."""
    loaded: bool = False
    """The decode group waits for records no longer."""
    catching_up: bool = False
    """It was moved in the middle of its answer and has told nothing new yet."""

    @classmethod
    def new(cls, request: Request, *, arrival: int, max_model_len: int, block_size: int) -> TrackedRequest:
        n, num_prompt = request.params.n, len(request.prompt_token_ids)
        generated = [*request.generated, *[GeneratedTokens()] * (n - len(request.generated))]
        return cls(
            request,
            request.request_id,
            n,
            num_prompt,
            arrival,
            block_size,
            max(0, max_output_tokens(request, max_model_len)),
            prefix_hashes(request.prompt_token_ids),
            generated,
            sum([in_blocks(num_prompt + len(g.token_ids) + 1, block_size) for g in generated]),
            [0] * n,
        )

    def extend(self, index: int, new: GeneratedTokens) -> int:
        """A continuation has new tokens; returns what it takes of the cache for them."""
        known = self.generated[index]
        self.generated[index] = known.extended(new)
        end = self.num_prompt_tokens + len(known.token_ids) + 1
        more = in_blocks(end + len(new.token_ids), self.block_size) - in_blocks(end, self.block_size)
        self.num_kv_tokens += more
        return more

    def begin_again(self) -> None:
        """The next attempt, with no group; what is known of the answer is kept."""
        self.attempt += 1
        self.prefill = self.decode = self.prefilled = None
        self.announced = self.loaded = self.catching_up = False

    @property
    def engine_id(self) -> str:
        return f"{self.request_id}#{self.attempt}"

    @property
    def known(self) -> tuple[GeneratedTokens, ...]:
        """For an engine that is to go on from there."""
        return tuple(self.generated) if self.num_known_tokens else ()

    @property
    def num_known_tokens(self) -> int:
        return sum([len(g.token_ids) for g in self.generated])

    @property
    def num_tokens_left(self) -> int:
        """To generate, at most."""
        return self.n * self.max_output_tokens - self.num_known_tokens

    @property
    def num_tokens_expected(self) -> int:
        """To generate, as a guess: as many again as there are."""
        return min(self.num_tokens_left, self.num_known_tokens)

    @property
    def num_tokens_again(self) -> int:
        """To compute before another group can go on with it."""
        return self.num_prompt_tokens + self.num_known_tokens

    @property
    def is_whole(self) -> bool:
        """Whether the group that answers it computes its prompt, too."""
        return self.prefill is None and not self.announced

    @property
    def scores_prompt(self) -> bool:
        """Whether something is wanted that only the group has that computes the prompt."""
        return self.request.params.prompt_logprobs is not None

    @property
    def splittable(self) -> bool:
        """Two groups may share it; but the scores of a prompt are not put at risk again after a first attempt."""
        return self.attempt == 0 or not self.scores_prompt

    @property
    def needs_prefill(self) -> bool:
        """Whether the decode group cannot go on alone."""
        return self.prefilled is None and (not self.announced or self.scores_prompt)

    def needs_no_less_than(self, other: TrackedRequest) -> bool:
        """So that it finds no room if the other one does not, as a rule."""
        return self.num_kv_tokens >= other.num_kv_tokens and self.n >= other.n

    @property
    def prompt_share(self) -> Share:
        """The prompt, and one token of every continuation."""
        n, num_prompt = self.n, self.num_prompt_tokens
        return Share(n, num_prompt, n * in_blocks(num_prompt + 1, self.block_size), hands_over=True)

    @property
    def answer_share(self) -> Share:
        """What follows a prompt that is computed elsewhere."""
        n = self.n
        return Share(n, n * self.max_output_tokens, self.num_kv_tokens)

    @property
    def whole_share(self) -> Share:
        """The prompt and what follows it."""
        n = self.n
        return Share(n, self.num_prompt_tokens + n * self.max_output_tokens, self.num_kv_tokens)

    def share_of(self, group: int) -> Share:
        """What a group has of it now."""
        if group == self.prefill:
            return self.prompt_share
        return self.whole_share if self.is_whole else self.answer_share


def choose_to_move(
    group: int, state: Group, tracked: Mapping[str, TrackedRequest]
) -> tuple[TrackedRequest, bool] | None:
    """What another group should take over of this one, and whether it was begun: the last request that only waits;
    else, of those that are generated, the one with most ahead of it, if that relieves the others of more than it costs.
    """
    waiting: list[TrackedRequest] = []
    generating: list[TrackedRequest] = []
    num_seqs = 0
    for request_id, share in state.requests.items():
        one = tracked[request_id]
        num_seqs += share.num_seqs
        if one.prefill == group:
            if not one.announced:
                waiting.append(one)
        elif one.prefill is None or one.prefilled is not None:
            has_place = not one.is_whole or num_seqs <= state.spec.max_num_seqs
            (generating if has_place else waiting).append(one)
    movable = [one for one in waiting if one.num_moves < MAX_MOVES]
    if movable:
        return movable[-1], False
    expected = sum([one.num_tokens_expected for one in generating])
    movable = [
        one
        for one in generating
        if one.num_moves < MAX_MOVES
        and not one.request.stream  # somebody watches, who would see it stand still
        and one.num_tokens_left > one.num_tokens_again
        and expected - one.num_tokens_expected > MOVE_GAIN * one.num_tokens_again
    ]
    return (max(movable, key=lambda one: one.num_tokens_left - one.num_tokens_again), True) if movable else None


def in_blocks(num_tokens: int, block_size: int) -> int:
    """What a sequence of so many tokens takes of a cache."""
    return -(-num_tokens // block_size) * block_size


def generated_by(output: RequestOutput) -> tuple[GeneratedTokens, ...]:
    """What an output says of each continuation, in the form in which another engine takes it."""
    return tuple(
        GeneratedTokens(tuple(o.token_ids), None if o.logprobs is None else tuple(o.logprobs)) for o in output.outputs
    )


def tokens_from(generated: GeneratedTokens, start: int) -> GeneratedTokens:
    """Those from a position on."""
    logprobs = None if generated.logprobs is None else generated.logprobs[start:]
    return GeneratedTokens(generated.token_ids[start:], logprobs)
