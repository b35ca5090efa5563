"""Rows to requests: what becomes the prompt, seeds, nulls that Arrow writes, and rows that cannot be answered."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.cluster.bundled import BUNDLED_MODEL
from shoal.cluster.data.columns import read_rows
from shoal.cluster.data.config import EngineProcessorConfig
from shoal.cluster.data.rows import RowReader, RowRequest, row_seed
from shoal.cluster.openai.chat_options import ChatOptions
from shoal.cluster.openai.errors import ApiError
from shoal.cluster.prompts import ModelPrompts, request_defaults

MODEL = str(BUNDLED_MODEL)
QUESTION = [{"role": "user", "content": "What is 2 + 3?"}]
PROMPTS = ModelPrompts.from_pretrained(MODEL)
assert PROMPTS is not None


def reader(chat_template_kwargs: Mapping[str, Any] | None = None, **values: Any) -> RowReader:
    config = EngineProcessorConfig(model_source=MODEL, **values)
    return RowReader(config, request_defaults(config.engine_args, {}, thinking=None), chat_template_kwargs or {})


READER = reader()


def read(row: Mapping[str, Any], **values: Any) -> RowRequest:
    return reader(**values).read(row)


def chat_ids(messages: list[dict[str, str]], **options: Any) -> tuple[int, ...]:
    assert PROMPTS is not None
    return tuple(PROMPTS.encode_chat(messages, ChatOptions(**options)).token_ids)


def text_ids(text: str) -> tuple[int, ...]:
    assert PROMPTS is not None
    return tuple(PROMPTS.encode_text(text).token_ids)


def test_messages_go_first_then_the_prompt_then_token_ids() -> None:
    row = {"messages": QUESTION, "prompt": "2 + 3 =", "tokenized_prompt": [5, 6]}
    request = read(row)
    assert request.parsed.prompt_token_ids == chat_ids(QUESTION)
    assert request.prompt.endswith("<｜User｜>What is 2 + 3?<｜Assistant｜></think>")
    assert read(row, chat_template_stage=False).parsed.prompt_token_ids == text_ids("2 + 3 =")
    request = read(row, chat_template_stage=False, tokenize_stage=False)
    assert (request.parsed.prompt_token_ids, request.prompt) == ((5, 6), "2 + 3 =")
    assert read({"tokenized_prompt": np.array([5, 6])}).parsed.prompt_token_ids == (5, 6)
    assert read({"prompt": "a"}, tokenize_stage=False).parsed.prompt_token_ids == text_ids("a")


def test_a_last_message_of_the_assistant_is_continued() -> None:
    begun = [*QUESTION, {"role": "assistant", "content": "It is"}]
    assert read({"messages": begun}).parsed.prompt_token_ids == chat_ids(begun, continue_final_message=True)


def test_template_switches_of_a_row_go_before_those_of_the_processor() -> None:
    thinks = reader({"enable_thinking": True})
    row: dict[str, Any] = {"messages": QUESTION}
    assert thinks.read(row).parsed.prompt_token_ids == chat_ids(QUESTION, thinking=True)
    row |= {"chat_template_kwargs": {"enable_thinking": False}}
    assert thinks.read(row).parsed.prompt_token_ids == chat_ids(QUESTION, thinking=False)


def test_sampling_params_are_those_of_llm() -> None:
    assert PROMPTS is not None
    request = read({"prompt": "a", "sampling_params": {"temperature": 0, "max_tokens": 3, "logprobs": 2}})
    assert (request.parsed.params.temperature, request.parsed.params.max_tokens) == (0, 3)
    assert request.parsed.num_logprobs == 2
    assert read({"prompt": "a", "sampling_params": {}}).parsed.params.max_tokens == 16, "vLLM's default, chat too"
    assert read({"messages": QUESTION, "sampling_params": {}}).parsed.params.max_tokens == 16


def test_text_is_left_out_only_if_nobody_wants_it() -> None:
    row = {"prompt": "a", "sampling_params": {"detokenize": False}}
    assert read(row).wants_text
    assert not read(row, detokenize_stage=False).wants_text
    assert read({"prompt": "a"}, detokenize_stage=False).wants_text


def test_seeds_come_from_the_prompt() -> None:
    sampled = {"prompt": "a", "sampling_params": {"temperature": 1.0}}
    seed = read(sampled).parsed.params.seed
    assert seed == row_seed(0, text_ids("a"))
    assert seed is not None
    assert 0 <= seed < 2**63
    assert read(sampled | {"id": 7}).parsed.params.seed == seed
    assert read(sampled | {"prompt": "b"}).parsed.params.seed != seed
    assert read(sampled, engine_kwargs={"seed": 1}).parsed.params.seed != seed
    assert read(sampled | {"sampling_params": {"seed": 5}}).parsed.params.seed == 5
    assert row_seed(0, (1, 23)) != row_seed(0, (12, 3)) != row_seed(0, (123,))


@pytest.mark.parametrize(
    ("row", "code", "message"),
    [
        ({}, "missing_prompt", "the row has no messages, prompt or tokenized_prompt"),
        ({"messages": "hello"}, "invalid_type", "messages must be a list"),
        ({"messages": []}, "empty_prompt", "messages is empty"),
        ({"messages": [{"role": "user"}]}, "invalid_messages", ""),
        ({"messages": [{"role": "robot", "content": "x"}]}, "invalid_messages", "role must be one of"),
        ({"messages": QUESTION, "chat_template_kwargs": {"thinks": True}}, "unknown_field", "chat_template_kwargs."),
        ({"messages": QUESTION, "chat_template_kwargs": [1]}, "invalid_type", "chat_template_kwargs must be a mapping"),
        ({"prompt": ""}, "empty_prompt", ""),
        ({"prompt": 3}, "invalid_type", "prompt must be a string"),
        ({"tokenized_prompt": []}, "empty_prompt", ""),
        ({"tokenized_prompt": [1.5]}, "invalid_type", ""),
        ({"tokenized_prompt": [10**6]}, "token_out_of_vocabulary", ""),
        ({"prompt": "a", "sampling_params": {"max_tokens": -1}}, "invalid_parameter", "max_tokens must be"),
        ({"prompt": "a", "sampling_params": {"temprature": 1}}, "unknown_field", "did you mean temperature"),
        ({"prompt": "a", "sampling_params": {"n": 2}}, "unsupported_value", "n must be 1"),
        ({"prompt": "a", "sampling_params": {"best_of": 2}}, "unsupported_field", "sampling_params.best_of"),
        ({"prompt": "a", "sampling_params": "greedy"}, "invalid_type", "sampling_params must be a mapping"),
        ({"prompt": "a", "sampling_params": {"temperature": math.nan}}, "invalid_parameter", "temperature"),
    ],
)
def test_rows_that_cannot_be_answered_say_why(row: dict[str, Any], code: str, message: str) -> None:
    with pytest.raises(ApiError, match=message or None) as caught:
        READER.read(row)
    assert caught.value.code == code


SAMPLING = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.5]),
        "max_tokens": st.integers(1, 9),
        "stop": st.lists(st.sampled_from(["a", "bc"]), max_size=2),
        "seed": st.integers(0, 5),
        "logit_bias": st.dictionaries(st.sampled_from(["5", "7"]), st.just(1.5), min_size=1),
    },
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.just("user"), "content": st.text("xyz", min_size=1)}, optional={"name": st.just("ann")}
)
ROW = st.one_of(
    st.fixed_dictionaries(
        {"messages": st.lists(MESSAGE, min_size=1, max_size=2)}, optional={"sampling_params": SAMPLING}
    ),
    st.fixed_dictionaries({"prompt": st.text("xyz", min_size=1)}, optional={"sampling_params": SAMPLING}),
    st.fixed_dictionaries({"tokenized_prompt": st.lists(st.integers(0, 200), min_size=1)}),
)


@given(st.lists(ROW, min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_what_shares_a_block_changes_no_request(rows: list[dict[str, Any]]) -> None:
    """Arrow gives every row of a block the fields of all of them, null where a row has none."""
    names = {name for row in rows for name in row}
    table = pa.table({name: pa.array([row.get(name) for row in rows]) for name in sorted(names)})
    assert [READER.read(row) for row in read_rows(table)] == [READER.read(row) for row in rows]
