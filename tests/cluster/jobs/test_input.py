# ruff: noqa: E501  (a case of the table is one line)
from __future__ import annotations

import contextlib
import gzip
import json
import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.cluster.jobs.input.bad_row import BadRow, Place
from shoal.cluster.jobs.input.custom_ids import CustomIdIndex
from shoal.cluster.jobs.input.files import InputFile
from shoal.cluster.jobs.input.lines import MAX_LINE_BYTES, InputLine, parse_line, read_lines
from shoal.cluster.jobs.input.rows import InputRow
from shoal.cluster.jobs.row_output import FinishedRow
from shoal.cluster.jobs.rows import BatchRow, read_row
from shoal.cluster.jobs.validation import InputSummary, validate_input
from shoal.cluster.openai.errors import MAX_MESSAGE_CHARS
from shoal.cluster.openai.json_object import MAX_DEPTH
from shoal.cluster.openai.requests import RequestDefaults
from shoal.cluster.prompts import ModelPrompts
from shoal.runtime.chat.formats import CHAT_FORMATS
from shoal.runtime.tokenization.byte_tokenizer import write_byte_tokenizer
from shoal.runtime.tokenization.tokenizer import Tokenizer
from tests.support.batch_input import first_row, input_file, job_input
from tests.support.stub_job import RULES

DOCUMENT = Path(__file__).parents[3] / "docs" / "bad-input.md"


@dataclass(frozen=True)
class BadCase:
    what: str
    data: bytes
    code: str
    message: str
    shown: str | None = None
    """How the document writes the row, where the bytes themselves cannot be shown."""


def chat(**body: Any) -> bytes:
    body = {"messages": [{"role": "user", "content": "hi"}]} | body
    return json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}).encode()


BAD_ROWS = [
    BadCase("not JSON", b'{"prompt": "x"', "invalid_json", "not JSON: Expecting ',' delimiter (character 15 of the line)"),
    BadCase("cut off inside a string", b'{"prompt": "x', "invalid_json", "not JSON: Unterminated string starting at (character 12 of the line)"),
    BadCase("two objects on a line", b'{"prompt": "x"} {}', "invalid_json", "not JSON: Extra data (character 17 of the line)"),
    BadCase("a list", b'["x"]', "not_an_object", "a row must be a JSON object, this one is a list"),
    BadCase("null", b"null", "not_an_object", "a row must be a JSON object, this one is null"),
    BadCase("bytes that are not UTF-8", b'{"prompt": "\xff"}', "invalid_utf8", "byte 13 of the line (0xff) is not valid UTF-8", '{"prompt": "\\xff"}'),
    BadCase("half a surrogate pair", b'{"prompt": "\\ud800"}', "invalid_unicode", "a \\u escape is half of a surrogate pair, which is not a character"),
    BadCase("byte order mark", b'\xef\xbb\xbf{"prompt": "x"}', "byte_order_mark", "the line starts with a byte order mark; save the file as UTF-8 without one", '\\xef\\xbb\\xbf{"prompt": "x"}'),
    BadCase("NUL byte", b'{"prompt": "a\0b"}', "nul_byte", "byte 14 of the line is NUL; the file may be UTF-16 or damaged", '{"prompt": "a\\x00b"}'),
    BadCase("nested too deep", b'{"prompt": ' + b"[" * 100 + b"]" * 100 + b"}", "nested_too_deep", "lists and objects are nested more than 100 levels deep", '{"prompt": [[[... 100 times'),
    BadCase("nested deep enough to exhaust a stack", b"[" * 200_000, "nested_too_deep", "lists and objects are nested more than 100 levels deep", "[[[... 200000 times"),
    BadCase("a line above 8 MiB", b'{"prompt": "' + b"x" * (8 << 20) + b'"}', "line_too_long", "the line has 8388622 bytes, at most 8388608 are allowed", '{"prompt": "xxx... 8 MiB'),
    BadCase("NaN", b'{"prompt": "x", "temperature": NaN}', "non_finite_number", "NaN is not a JSON number"),
    BadCase("Infinity", b'{"prompt": "x", "temperature": -Infinity}', "non_finite_number", "-Infinity is not a JSON number"),
    BadCase("a number above the range of floats", b'{"prompt": "x", "temperature": 1e999}', "non_finite_number", "the number 1e999 is too large"),
    BadCase("a whole number of 5000 digits", b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "number_too_large", "a whole number has 5000 digits, at most 20 are read", '{"prompt": "x", "seed": 999... 5000 digits}'),
    BadCase("a key given twice", b'{"prompt": "x", "prompt": "y"}', "duplicate_key", "the key 'prompt' appears more than once in one object"),
    BadCase("a misspelt field", b'{"prompt": "x", "temprature": 1}', "unknown_field", "temprature is not a known field; did you mean temperature?"),
    BadCase("a misspelt field of a body", chat(max_token=1), "unknown_field", "max_token is not a known field; did you mean max_tokens?"),
    BadCase("streaming", chat(stream=True), "unsupported_field", "stream = True is not supported; remove it: answers come whole"),
    BadCase("calls that are required, without tools", chat(tool_choice="required"), "invalid_parameter", "tool_choice = 'required' needs tools"),
    BadCase("an unknown response format", chat(response_format={"type": "yaml"}), "invalid_parameter", "response_format.type must be one of text, json_object, json_schema, got 'yaml'"),
    BadCase("two forms of an answer", chat(response_format={"type": "json_object"}, guided_regex="a+"), "invalid_parameter", "give one of guided_regex and response_format, not both"),
    BadCase("a form that says nothing", b'{"prompt": "x", "structured_outputs": {}}', "invalid_grammar", "structured_outputs takes one of json, regex, choice, grammar, json_object, got none of them"),
    BadCase("a form without an end", b'{"prompt": "x", "structured_outputs": {"regex": "a"}, "ignore_eos": true}', "invalid_parameter", "ignore_eos cannot be combined with structured_outputs, whose form says where the answer ends"),
    BadCase("another method", b'{"custom_id": "a", "method": "GET", "url": "/v1/completions", "body": {}}', "unsupported_method", "method must be POST, got 'GET'"),
    BadCase("another endpoint", b'{"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {}}', "unsupported_url", "url must be /v1/chat/completions or /v1/completions, got '/v1/embeddings'"),
    BadCase("no endpoint", b'{"custom_id": "a", "method": "POST", "body": {}}', "unsupported_url", "url must be /v1/chat/completions or /v1/completions, got null"),
    BadCase("no custom_id", b'{"method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}', "missing_custom_id", "the line has no custom_id; give each line a string of its own"),
    BadCase("a custom_id that is no string", b'{"custom_id": 7.5, "prompt": "x"}', "invalid_custom_id", "custom_id must be a string of 1 to 512 characters, got a number"),
    BadCase("a body that is no object", b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": "x"}', "invalid_type", "body must be an object, got a string"),
    BadCase("no prompt", b'{"custom_id": "a"}', "missing_prompt", "the request has neither prompt nor messages"),
    BadCase("no messages", chat(messages=None), "missing_prompt", "the request has no messages"),
    BadCase("prompt and messages", b'{"prompt": "x", "messages": []}', "invalid_parameter", "give one of messages and prompt, not both"),
    BadCase("empty prompt", b'{"prompt": ""}', "empty_prompt", "the prompt is empty; give it at least one token"),
    BadCase("empty list of ids", b'{"prompt": []}', "empty_prompt", "the prompt is empty; give it at least one token"),
    BadCase("empty messages", chat(messages=[]), "empty_prompt", "messages is empty; give at least one message"),
    BadCase("a list of prompts", b'{"prompt": ["x", "y"]}', "unsupported_value", "prompt is a list of prompts; ask for each one by itself"),
    BadCase("a prompt of another type", b'{"prompt": 5}', "invalid_type", "prompt must be a string or a list of token ids, got a number"),
    BadCase("an id that is no whole number", b'{"prompt": [1, 2.5]}', "invalid_type", "prompt[1] must be a token id, got 2.5"),
    BadCase("an id outside the vocabulary", b'{"prompt": {"prompt_token_ids": [1, 512]}}', "token_out_of_vocabulary", "prompt token id 512 is outside the vocabulary [0, 512)"),
    BadCase("a negative id", b'{"prompt_token_ids": [-1]}', "token_out_of_vocabulary", "prompt token id -1 is outside the vocabulary [0, 512)"),
    BadCase("a prompt that leaves no room for output", b'{"prompt": "' + b"x" * 127 + b'"}', "context_length_exceeded", "This model's maximum context length is 128 tokens; the prompt has 128, and at least one token of output must fit, too", '{"prompt": "xxx... 127 times"}'),
    BadCase("a message that is no object", chat(messages=["hi"]), "invalid_type", "messages[0] must be an object, got a string"),
    BadCase("a message without a role", chat(messages=[{"content": "hi"}]), "invalid_type", "messages[0].role must be a string, got null"),
    BadCase("a role that the prompt format lacks", chat(messages=[{"role": "narrator", "content": "hi"}]), "invalid_messages", "messages[0]: role must be system, user or assistant, got 'narrator'"),
    BadCase("thinking that is no boolean", chat(chat_template_kwargs={"thinking": "yes"}), "invalid_type", "chat_template_kwargs.thinking must be true or false, got a string"),
    BadCase("an unknown template switch", chat(chat_template_kwargs={"think": True}), "unknown_field", "chat_template_kwargs.think is not a known field; did you mean thinking?"),
    BadCase("a template switch given twice", chat(chat_template_kwargs={"thinking": True, "enable_thinking": False}), "invalid_parameter", "chat_template_kwargs.thinking and chat_template_kwargs.enable_thinking mean the same and contradict each other; give one"),
    BadCase("no header for the answer", chat(add_generation_prompt=False), "unsupported_field", "add_generation_prompt false is not supported: an answer needs its header; remove it"),
    BadCase("a part of a token", b'{"prompt": "x", "max_tokens": 16.5}', "invalid_parameter", "max_tokens must be a whole number of at least 1 or null, got 16.5"),
    BadCase("temperature below 0", b'{"prompt": "x", "temperature": -1}', "invalid_parameter", "temperature must be a number between 0 and 100, got -1"),
    BadCase("temperature as text", b'{"prompt": "x", "temperature": "hot"}', "invalid_parameter", "temperature must be a number between 0 and 100, got 'hot'"),
    BadCase("true for a number", b'{"prompt": "x", "max_tokens": true}', "invalid_parameter", "max_tokens must be a whole number of at least 1 or null, got True"),
    BadCase("a count above 64 bits", b'{"prompt": "x", "top_k": 99999999999999999999}', "invalid_parameter", "top_k must fit into 64 bits, got 99999999999999999999"),
    BadCase("a million answers", b'{"prompt": "x", "n": 1000000}', "invalid_parameter", "n must be a whole number between 1 and 1024, got 1000000"),
    BadCase("more output than a row may have", b'{"prompt": "x", "n": 1024, "max_tokens": 100, "logprobs": 100}', "request_too_large", "n x max_tokens x (logprobs + 1) plus the prompt's logprobs is 10342402, at most 4000000 are allowed; lower n, max_tokens or logprobs"),
    BadCase("more logprobs than tokens exist", b'{"prompt": "x", "prompt_logprobs": 600}', "invalid_parameter", "600 logprobs were asked for, but the vocabulary has 512 tokens"),
    BadCase("max_tokens and max_completion_tokens", chat(max_tokens=1, max_completion_tokens=1), "invalid_parameter", "give max_tokens or max_completion_tokens, not both"),
    BadCase("top_logprobs without logprobs", chat(top_logprobs=2), "invalid_parameter", "top_logprobs needs logprobs: true"),
    BadCase("completion logprobs for chat", chat(logprobs=2), "invalid_type", "logprobs must be true or false for chat, got a number"),
    BadCase("a field given twice in two places", b'{"prompt": "x", "n": 1, "sampling_params": {"n": 2}}', "invalid_parameter", "n is given both in the row and in sampling_params"),
    BadCase("stop of another type", b'{"prompt": "x", "stop": 5}', "invalid_type", "stop must be a string or a list of strings, got a number"),
    BadCase("an empty stop string", b'{"prompt": "x", "stop": [""]}', "invalid_parameter", "stop must be non-empty text, a list of non-empty texts or null, got ['']"),
    BadCase("stop strings without end", b'{"prompt": "x", "stop": "' + b"x" * 5000 + b'"}', "invalid_parameter", "stop has 5000 characters in all, at most 4096 are allowed", '{"prompt": "x", "stop": "xxx... 5000 times"}'),
    BadCase("more stop tokens than are looked for", b'{"prompt": "x", "stop_token_ids": [' + b"1, " * 1024 + b"1]}", "invalid_parameter", "stop_token_ids has 1025 ids, at most 1024 are allowed", '{"prompt": "x", "stop_token_ids": [1, 1, ... 1025 times]}'),
    BadCase("a stop token outside the vocabulary", b'{"prompt": "x", "stop_token_ids": [512]}', "token_out_of_vocabulary", "stop token id 512 is outside the vocabulary [0, 512)"),
    BadCase("a bias on no token", b'{"prompt": "x", "logit_bias": {"yes": 5}}', "invalid_type", "logit_bias keys must be token ids, got 'yes'"),
    BadCase("a bias outside the vocabulary", b'{"prompt": "x", "logit_bias": {"9999": 5}}', "token_out_of_vocabulary", "logit_bias token id 9999 is outside the vocabulary [0, 512)"),
    BadCase("a custom_id used before", b'{"custom_id": "good-1", "prompt": "x"}', "duplicate_custom_id", "line 2 repeats the custom_id 'good-1' of line 1"),
]  # fmt: skip


def check_file(
    path: Path, rules: RequestDefaults = RULES
) -> tuple[InputSummary, list[tuple[InputRow, BadRow, FinishedRow]]]:
    found: list[tuple[InputRow, BadRow, FinishedRow]] = []
    ids = CustomIdIndex(path.with_suffix(".sqlite"))
    summary = validate_input(
        job_input(path),
        rules,
        ids,
        on_good_row=lambda index, payload: None,
        on_bad_row=lambda finished, e, row: found.append((row, e, finished)),
        on_row=lambda _: None,
    )
    ids.close()
    return summary, found


def good_row(text: str, rules: RequestDefaults = RULES) -> BatchRow:
    return read_row(first_row(text.encode()), rules)


@pytest.mark.parametrize("case", BAD_ROWS, ids=lambda case: case.what)
def test_a_bad_row_is_one_error_and_its_neighbours_are_fine(tmp_path: Path, case: BadCase) -> None:
    before, after = b'{"custom_id": "good-1", "prompt": "x"}\n', b'\n{"custom_id": "good-2", "prompt": "x"}'
    (tmp_path / "in.jsonl").write_bytes(before + case.data + after)
    summary, found = check_file(tmp_path / "in.jsonl")
    assert [(row.place, e.code, e.message) for row, e, _ in found] == [
        (Place("line", 2, len(before)), case.code, case.message)
    ]
    assert (summary.num_rows, summary.num_bad_rows, summary.bad_rows) == (3, 1, {case.code: 1})
    error = json.loads(found[0][2].data)["error"]
    assert error == {"code": case.code, "message": case.message, "line": 2, "byte_offset": len(before)}


@pytest.mark.docs
def test_the_document_lists_every_bad_row() -> None:
    lines = [
        "# Rows that cannot be answered",
        "",
        "Each of these rows gives one line in `errors.jsonl`, with the code, the message, the line number and the byte",
        "offset of the row; the rest of the job goes on. The vocabulary of the examples has 512 tokens and the context 128.",
        "`make docs` writes this table from the cases that the tests run.",
        "",
        "| row | example | code | message |",
        "|---|---|---|---|",
    ]
    for case in BAD_ROWS:
        shown = (case.shown or case.data.decode()).replace("|", "\\|")
        lines.append(f"| {case.what} | `{shown}` | `{case.code}` | {case.message} |")
    lines += [
        "",
        "Lines of white space are skipped, lines may end in LF or CRLF, the last line needs no ending, and a field that is",
        "null counts as not given. A damaged compressed file is refused as a whole.",
        "",
    ]
    text = "\n".join(lines)
    if os.environ.get("SHOAL_WRITE_DOCS"):
        DOCUMENT.write_text(text, encoding="utf-8")
    assert DOCUMENT.read_text(encoding="utf-8") == text, "run `make docs`"


def test_blank_lines_line_endings_and_offsets(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"prompt":"a"}\r\n\n   \r\n{"prompt":"b"}\n{"prompt":"c"}')
    lines = list(read_lines(input_file(tmp_path / "in.jsonl")))
    assert [(x.number, x.byte_offset, x.data) for x in lines] == [
        (1, 0, b'{"prompt":"a"}'),
        (4, 22, b'{"prompt":"b"}'),
        (5, 37, b'{"prompt":"c"}'),
    ]


@given(
    contents=st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"").replace(b"\r", b"")), max_size=8),
    last_ending=st.booleans(),
    limit=st.integers(1, 8),
)
@settings(max_examples=200, deadline=None)
def test_lines_are_found_whatever_the_limit(
    tmp_path_factory: pytest.TempPathFactory, contents: list[bytes], last_ending: bool, limit: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "in.jsonl"
    contents = [b"{}", *contents]  # a file whose first bytes are those of another format is refused as a whole
    data = b"\n".join(contents) + (b"\n" if last_ending else b"")
    path.write_bytes(data)
    expected: list[tuple[int, int, int, bytes]] = []
    offset = 0
    for number, content in enumerate(contents, 1):
        if content.strip() or len(content) > limit:
            expected.append((number, offset, len(content), content if len(content) <= limit else b""))
        offset += len(content) + 1
    lines = read_lines(input_file(path), max_line_bytes=limit)
    assert [(x.number, x.byte_offset, x.num_bytes, x.data) for x in lines] == expected


def test_gzip_reads_as_the_text_inside(tmp_path: Path) -> None:
    text = b"".join(b'{"prompt": "row %d"}\n' % i for i in range(100))
    (tmp_path / "in.jsonl").write_bytes(text)
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(text))
    assert list(read_lines(input_file(tmp_path / "in.jsonl.gz"))) == list(read_lines(input_file(tmp_path / "in.jsonl")))


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b"not gzip", lambda b: b[:40] + b"\xff" * 9 + b[49:]])
def test_damaged_gzip_is_refused(tmp_path: Path, damage: Any) -> None:
    data = gzip.compress(b"".join(b'{"prompt": "row %d"}\n' % (i * i) for i in range(100)))
    (tmp_path / "in.jsonl.gz").write_bytes(damage(data))
    with pytest.raises(ValueError, match="compressed data is damaged after line"):
        list(read_lines(input_file(tmp_path / "in.jsonl.gz")))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.jsonl is not a file, a directory or a pattern"):
        job_input(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"cannot read the input .*none.jsonl: No such file or directory"):
        list(read_lines(InputFile(str(tmp_path / "none.jsonl"), 1)))


def test_an_openai_chat_row() -> None:
    row = good_row(
        '{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "user": null, '
        '"messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 7, "temperature": 0.5, "n": 2, '
        '"stop": "x", "seed": 3, "logprobs": true, "top_logprobs": 4, "logit_bias": {"5": -1}, "tools": [], '
        '"stream": false, "chat_template_kwargs": {"thinking": true}}}'
    )
    assert (row.custom_id, row.parsed.endpoint, row.parsed.num_logprobs) == ("a", "/v1/chat/completions", 4)
    assert row.request.prompt_token_ids == (0, 1, 3 + ord("h"), 3 + ord("i"), 300)
    params = row.request.params
    assert (params.max_tokens, params.temperature, params.n, params.stop, params.seed) == (7, 0.5, 2, ("x",), 3)
    assert (params.logprobs, params.logit_bias) == (4, {5: -1})


def test_an_openai_completion_row() -> None:
    row = good_row(
        '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": [1, 2], "logprobs": 2}}'
    )
    assert (row.parsed.endpoint, row.parsed.num_logprobs, row.request.params.max_tokens) == ("/v1/completions", 2, 16)
    assert row.request.prompt_token_ids == (1, 2)


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": "ab"}',
        '{"prompt": [0, 100, 101]}',
        '{"prompt_token_ids": [0, 100, 101]}',
        '{"prompt": {"prompt_token_ids": [0, 100, 101]}}',
    ],
)
def test_plain_prompts(text: str) -> None:
    row = good_row(text)
    assert row.request.prompt_token_ids == (0, 100, 101)
    assert (row.custom_id, row.parsed.endpoint, row.parsed.num_logprobs, row.request.params.logprobs) == (
        "row-0",
        "/v1/completions",
        None,
        0,
    )


def test_plain_messages_with_nested_sampling() -> None:
    row = good_row('{"id": 9, "messages": [{"role": "user", "content": "a"}], "sampling_params": {"top_k": 3}}')
    assert (row.custom_id, row.parsed.endpoint, row.request.params.top_k) == ("9", "/v1/chat/completions", 3)


def test_defaults_of_the_job_stand_behind_the_row() -> None:
    rules = replace(RULES, sampling={"temperature": 0.25, "max_tokens": 5}, thinking=True)
    openai = '{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "a"}]%s}}'
    row = good_row(openai % "", rules)
    assert (row.request.params.temperature, row.request.params.max_tokens) == (0.25, 5)
    assert row.request.prompt_token_ids[-1] == 300
    row = good_row(openai % ', "max_tokens": 9, "temperature": 1', rules)
    assert (row.request.params.temperature, row.request.params.max_tokens) == (1, 9)
    assert good_row(openai % "").request.params.max_tokens is None


def test_whole_numbers_may_have_a_point_as_pandas_writes_them() -> None:
    row = good_row(
        '{"id": 7.0, "prompt": [1.0, 2], "max_tokens": 16.0, "seed": 7.0, "n": 1.0, "top_k": 5.0, "logprobs": 3.0, '
        '"min_tokens": 2.0, "stop_token_ids": [4.0], "temperature": 0, "logit_bias": null, "stop": null, '
        '"sampling_params": {"top_p": null}}'
    )
    params = row.request.params
    assert (row.custom_id, row.request.prompt_token_ids) == ("7", (1, 2))
    values = (params.max_tokens, params.seed, params.n, params.top_k, params.logprobs, params.min_tokens)
    assert values == (16, 7, 1, 5, 3, 2)
    assert {type(value) for value in (*values, *row.request.prompt_token_ids)} == {int}
    assert params.stop_token_ids == (4,)
    assert (params.temperature, params.top_p) == (0.0, 1.0)
    chat_row = good_row(chat(logprobs=True, top_logprobs=2.0, max_completion_tokens=3.0).decode())
    assert (chat_row.parsed.num_logprobs, chat_row.request.params.max_tokens) == (2, 3)


def test_fields_of_other_services_that_ask_for_nothing_are_taken() -> None:
    harmless: dict[str, Any] = {
        "model": "m",
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "parallel_tool_calls": True,
        "stream": False,
        "stream_options": None,
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "best_of": 1.0,
        "n": 1,
        "logprobs": False,
        "top_logprobs": 0,
        "add_generation_prompt": True,
        "continue_final_message": False,
        "return_token_ids": True,
        "reasoning_effort": None,
    }
    assert good_row(chat(**harmless).decode()).request == good_row(chat().decode()).request


def test_vllms_switches_continue_the_last_message(tmp_path: Path) -> None:
    rules = replace(RULES, encoder=real_encoder(str(tmp_path)))
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    prefix = [messages[0], messages[1] | {"prefix": True}]
    expected = good_row(chat(messages=prefix).decode(), rules).request
    switches = chat(messages=messages, add_generation_prompt=False, continue_final_message=True)
    assert good_row(switches.decode(), rules).request == expected
    assert good_row(chat(messages=messages, continue_final_message=True).decode(), rules).request == expected


@pytest.mark.parametrize(
    "text", ['{"prompt": "x"}', '{"messages": [{"role": "user", "content": "x"}]}', '{"prompt": [1], "stop": "x"}']
)
def test_without_a_tokenizer_only_ids_can_be_answered(text: str) -> None:
    rules = replace(RULES, encoder=None)
    with pytest.raises(BadRow) as error:
        good_row(text, rules)
    assert error.value.code == "no_tokenizer"
    assert good_row('{"prompt": [1]}', rules).request.prompt_token_ids == (1,)


def test_repeated_custom_ids_name_both_lines(tmp_path: Path) -> None:
    rows = [
        '{"custom_id": "a", "prompt": "x"}',
        '{"custom_id": "b", "bad": 1}',
        "{",
        '{"custom_id": "b", "prompt": "x"}',
    ]
    rows += ['{"custom_id": "a", "prompt": "x"}', '{"prompt": "x"}', '{"custom_id": "row-5", "prompt": "x"}']
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    _, found = check_file(tmp_path / "in.jsonl")
    assert [(row.place.number, e.code) for row, e, _ in found] == [
        (2, "unknown_field"),
        (3, "invalid_json"),
        (4, "duplicate_custom_id"),
        (5, "duplicate_custom_id"),
        (7, "duplicate_custom_id"),
    ]
    assert found[3][1].message == "line 5 repeats the custom_id 'a' of line 1"
    assert [json.loads(row.data)["custom_id"] for _, _, row in found] == ["b", None, "b", "a", "row-5"]


def test_the_summary_counts_prompt_lengths(tmp_path: Path) -> None:
    lengths = [1, 2, 3, 4, 5, 8, 9, 100]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"prompt": [1] * n}) for n in lengths))
    summary, _ = check_file(tmp_path / "in.jsonl")
    assert summary.to_dict() == {
        "num_rows": 8,
        "num_bad_rows": 0,
        "bad_rows": {},
        "num_prompt_tokens": sum(lengths),
        "max_prompt_tokens": 100,
        "prompt_lengths": {"<=1": 1, "<=2": 1, "<=4": 2, "<=8": 2, "<=16": 1, "<=128": 1},
    }


def test_the_summary_has_a_notice_of_prompts_that_spell_tokens(tmp_path: Path) -> None:
    rules = replace(RULES, encoder=real_encoder(str(tmp_path)))
    rows = [{"prompt": "hi"}, {"prompt": "<｜User｜>hi</think>"}, {"prompt": "</think>"}, {"prompt": [1]}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    summary, found = check_file(tmp_path / "in.jsonl", rules)
    assert not found
    assert summary.notice == (
        "2 rows have special tokens such as <｜User｜> in the text of their prompt; they are encoded as text: give "
        "messages or token ids instead"
    )
    (tmp_path / "in.jsonl").write_text(json.dumps(rows[0]))
    assert check_file(tmp_path / "in.jsonl", rules)[0].notice is None


def test_unterminated_strings_take_linear_time() -> None:
    data = b"[" * (MAX_DEPTH + 1) + b'"\\' * (MAX_LINE_BYTES // 2 - 60)
    with pytest.raises(BadRow) as error:
        parse_line(InputLine(1, 0, len(data), data))
    assert error.value.code == "nested_too_deep"


_json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_names = st.sampled_from(
    [
        *("custom_id", "id", "method", "url", "body", "prompt"),
        *("messages", "prompt_token_ids", "sampling_params", "chat_template_kwargs", "thinking", "model"),
        *("role", "content", "n", "temperature", "top_p", "top_k"),
        *("max_tokens", "min_tokens", "stop", "stop_token_ids", "seed", "logprobs"),
        *("top_logprobs", "prompt_logprobs", "logit_bias", "stream", "tools", "prefix"),
        *("tool_calls", "reasoning_content"),
    ]
)
_fields = st.dictionaries(_names, _json_values, max_size=4)
_message = (
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]) | _json_values}) | _fields
)
_rows = st.builds(
    lambda base, extra: {**base, **extra},
    st.sampled_from([{}, {"prompt": "x"}, {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}])
    | st.builds(lambda m: {"messages": m}, st.lists(_message, max_size=3))
    | st.builds(
        lambda m, b: {"custom_id": "a", "url": "/v1/chat/completions", "body": {"messages": m, **b}},
        st.lists(_message, max_size=3),
        _fields,
    ),
    _fields,
)


@cache
def real_encoder(directory: str) -> ModelPrompts:
    write_byte_tokenizer(Path(directory) / "tokenizer.json")
    tokenizer = Tokenizer.from_pretrained(directory)
    assert tokenizer is not None
    return ModelPrompts(tokenizer, CHAT_FORMATS["deepseek_v31"])


@given(row=_rows)
@settings(max_examples=300, deadline=None)
def test_any_object_is_a_row_or_a_bad_row(tmp_path_factory: pytest.TempPathFactory, row: dict[str, Any]) -> None:
    rules = replace(RULES, encoder=real_encoder(str(tmp_path_factory.getbasetemp())))
    source = first_row(json.dumps(row).encode())
    message: str = ""
    prompt: tuple[int, ...] = ()
    try:
        prompt = read_row(source, rules).request.prompt_token_ids
    except BadRow as error:
        message = error.message
    assert bool(message) != bool(prompt)
    assert len(message) <= MAX_MESSAGE_CHARS + 3


@given(data=st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_an_object_or_a_bad_row(data: bytes) -> None:
    with contextlib.suppress(BadRow):
        assert isinstance(parse_line(InputLine(1, 0, len(data), data)), dict)
