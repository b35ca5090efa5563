"""Where an output ends, and which text it keeps."""

from __future__ import annotations

import pytest

from shoal.runtime.engine.output_processor import OutputProcessor
from shoal.runtime.sampling.sampler import SampledToken
from shoal.runtime.tokenization.byte_tokenizer import write_byte_tokenizer
from shoal.runtime.tokenization.tokenizer import Tokenizer
from shoal.runtime.types import Request, SamplingParams

EOS, THINK_END = 1, 260


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> OutputProcessor:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(directory / "tokenizer.json")
    return OutputProcessor(Tokenizer.from_pretrained(directory), (EOS,))


def text_of(
    processor: OutputProcessor, params: SamplingParams, tokens: list[int], reasoning_end_token_id: int | None = None
) -> tuple[str, int]:
    """The text, and how many tokens were taken until the end."""
    request = Request(
        request_id="r", prompt_token_ids=(5,), params=params, reasoning_end_token_id=reasoning_end_token_id
    )
    state = processor.start(request, seed=0, max_tokens=100)
    (completion,) = state.completions
    for count, token in enumerate(tokens, 1):
        processor.append(completion, SampledToken(token, None))
        if completion.finished:
            return completion.detokenizer.text, count
    return completion.detokenizer.text, len(tokens)


def ids(text: str) -> list[int]:
    return [3 + byte for byte in text.encode()]


def test_stop_strings_apply_to_the_answer_and_not_to_the_reasoning(processor: OutputProcessor) -> None:
    tokens = [*ids("a. b"), THINK_END, *ids("c. d")]
    params = SamplingParams(stop=".")
    assert text_of(processor, params, tokens, THINK_END) == ("a. b</think>c", 7)
    assert text_of(processor, params, tokens) == ("a", 2)
    assert text_of(processor, SamplingParams(stop=".", stop_in_reasoning=True), tokens, THINK_END) == ("a", 2)
    assert text_of(processor, params, [*ids("a."), EOS], THINK_END) == ("a.", 3)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(stop_token_ids=ids("b")), ("a", 2)),
        (SamplingParams(stop_token_ids=ids("b"), include_stop_str_in_output=True), ("ab", 2)),
        (SamplingParams(include_stop_str_in_output=True), ("abc", 4)),  # the end token is special, and so no text
        (
            SamplingParams(include_stop_str_in_output=True, skip_special_tokens=False),
            ("abc<｜end▁of▁sentence｜>", 4),
        ),
        (SamplingParams(stop=["bc"], include_stop_str_in_output=True), ("abc", 3)),
    ],
)
def test_the_text_keeps_a_stop_token_on_request(
    processor: OutputProcessor, params: SamplingParams, expected: tuple[str, int]
) -> None:
    assert text_of(processor, params, [*ids("abc"), EOS]) == expected
