"""What a request may ask for is bounded by numbers, before anything is allocated for it."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.runtime.request_limits import RequestLimits, check_request
from shoal.runtime.types import MAX_STOP_CHARS, MAX_STOP_TOKEN_IDS, Request, SamplingParams

LIMITS = RequestLimits(vocab_size=1500, max_model_len=131_072)


def refusal(num_prompt: int, **params: Any) -> str | None:
    request = Request(request_id="", prompt_token_ids=(7,) * num_prompt, params=SamplingParams(**params))
    error = check_request(request, LIMITS)
    return None if error is None else error.code


@pytest.mark.parametrize(
    ("num_prompt", "params", "code"),
    [
        (1, {"max_tokens": None, "logprobs": 20}, None),  # 131,071 x 21 is 2.8 million
        (1, {"max_tokens": None, "logprobs": 30}, "request_too_large"),  # x 31: 4.1 million
        (1, {"max_tokens": 2**62, "logprobs": 30}, "request_too_large"),  # no more than the context
        (1, {"max_tokens": 3_900, "n": 1024}, None),
        (1, {"max_tokens": 4_000, "n": 1024}, "request_too_large"),
        (1, {"max_tokens": 40, "n": 100, "logprobs": 998}, None),
        (1, {"max_tokens": 40, "n": 100, "logprobs": 1000}, "request_too_large"),
        (3_990, {"prompt_logprobs": 1000}, None),
        (4_000, {"prompt_logprobs": 1000}, "request_too_large"),
        (2_000, {"prompt_logprobs": 1000, "logprobs": 1000, "max_tokens": 1_990}, None),
        (2_000, {"prompt_logprobs": 1000, "logprobs": 1000, "max_tokens": 2_000}, "request_too_large"),
        (131_071, {"max_tokens": None, "prompt_logprobs": 20}, None),
    ],
)
def test_positions_times_continuations_times_width_are_bounded(
    num_prompt: int, params: dict[str, Any], code: str | None
) -> None:
    assert refusal(num_prompt, **params) == code


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_there_is_no_value_that_means_everything(name: str) -> None:
    for value in (-1, 1025):
        with pytest.raises(ValueError, match=f"{name} must be a whole number between 0 and 1024 or null"):
            SamplingParams.from_dict({name: value})


@pytest.mark.parametrize("name", ["top_k", "max_tokens", "min_tokens", "seed"])
def test_what_no_message_can_hold_is_refused(name: str) -> None:
    assert getattr(SamplingParams.from_dict({"max_tokens": None, name: 2**63 - 1}), name) == 2**63 - 1
    with pytest.raises(ValueError, match=f"{name} must fit into 64 bits, got 9223372036854775808"):
        SamplingParams.from_dict({"max_tokens": None, name: 2**63})


def test_what_every_token_is_compared_with_is_bounded() -> None:
    half = "x" * (MAX_STOP_CHARS // 2)
    assert SamplingParams(stop=[half, half]).stop == (half, half)
    with pytest.raises(ValueError, match=f"{MAX_STOP_CHARS + 1} characters"):
        SamplingParams(stop=[half, half, "x"])
    assert SamplingParams(stop_token_ids=[3] * MAX_STOP_TOKEN_IDS).stop_token_ids == (3,) * MAX_STOP_TOKEN_IDS
    with pytest.raises(ValueError, match=f"{MAX_STOP_TOKEN_IDS + 1} ids"):
        SamplingParams(stop_token_ids=[3] * (MAX_STOP_TOKEN_IDS + 1))
