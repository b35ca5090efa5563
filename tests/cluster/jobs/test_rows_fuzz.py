"""Damaged input files: every line is one row or one error row at its place, and nothing else happens."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.cluster.jobs.input.bad_row import BadRow
from shoal.cluster.jobs.input.custom_ids import CustomIdIndex
from shoal.cluster.jobs.input.lines import InputLine
from shoal.cluster.jobs.input.rows import InputRow
from shoal.cluster.jobs.row_output import FinishedRow
from shoal.cluster.jobs.rows import read_row
from shoal.cluster.jobs.validation import validate_input
from shoal.cluster.openai.errors import MAX_MESSAGE_CHARS
from shoal.cluster.openai.fields import SAMPLING_FIELDS
from shoal.cluster.openai.requests import RequestDefaults
from shoal.cluster.prompts import ModelPrompts
from shoal.cluster.workers.wire import COMMANDS
from shoal.runtime.chat.formats import CHAT_FORMATS
from shoal.runtime.tokenization.byte_tokenizer import write_byte_tokenizer
from shoal.runtime.tokenization.tokenizer import Tokenizer
from tests.support.batch_input import job_input
from tests.support.stub_job import RULES

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "bad-input.md"
CODES = set(re.findall(r"` \| `(\w+)` \| ", DOCUMENT.read_text(encoding="utf-8")))
NUM_FILES, NUM_LINES = 1500, 12


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> RequestDefaults:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(directory / "tokenizer.json")
    tokenizer = Tokenizer.from_pretrained(directory)
    assert tokenizer is not None
    return replace(RULES, encoder=ModelPrompts(tokenizer, CHAT_FORMATS["deepseek_v31"]))


def valid_line(kind: int, custom_id: str) -> bytes:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "héllo 世\n"}]}]
    body: dict[str, Any] = {"messages": chat, "max_tokens": 4, "logprobs": True, "top_logprobs": 2, "stop": ["a", "b"]}
    rows: list[dict[str, Any]] = [
        {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body},
        {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": [1, 2], "n": 2}},
        {"id": custom_id, "prompt": 'a \\ " 😀', "temperature": 0.5, "logit_bias": {"5": -1}, "seed": 3},
        {"id": custom_id, "prompt_token_ids": [5, 6, 7], "sampling_params": {"top_k": 3, "stop_token_ids": [9]}},
        {"id": custom_id, "messages": chat, "chat_template_kwargs": {"thinking": True}, "prompt_logprobs": 1},
    ]
    return json.dumps(rows[kind % len(rows)], ensure_ascii=bool(kind % 2)).encode()


def insert(line: bytes, at: int, piece: bytes) -> bytes:
    return line[:at] + piece + line[at:]


def in_place_of_a_value(rng: random.Random, line: bytes, value: bytes) -> bytes:
    colons = [i for i, byte in enumerate(line) if byte == ord(":")]
    if not colons:
        return line + value
    at = rng.choice(colons) + 1
    return line[:at] + value + line[at + rng.choice([0, 1, 2, 8]) :]


PIECES = [
    b"\xef\xbb\xbf",
    b"\0",
    b"\xff",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\r",
    b"\r\r",
    b"\x0b",
    b"\x1a",
    b" ",
    b'"',
    b"\\",
]
PIECES += [b"[", b"]", b"{", b"}", b",", b":", b"[" * 70, b'{"a":' * 70, b"[" * 100_000, b"\\ud800", b"\\udc00\\ud800"]
PIECES += [b'"prompt":"x",', b'"custom_id":"a",', b'"n":null,', b"//", b"\xe2\x80\xa8", b"\\u0000", b"\\x"]
VALUES = [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"9" * 5000, b"9" * 20, b"-" + b"9" * 19, b"1e-999"]
VALUES += [b"18446744073709551616", b"9223372036854775808", b"0.1", b"true", b"null", b"[]", b"{}", b'""', b"[[1]]"]
VALUES += [b'{"a":1,"a":2}', b'"' + b"x" * 3000 + b'"', b'["' + b"x" * 3000 + b'"]', b"[1.5]", b'[{"role":[]}]', b"-0"]

LEAVES: list[Any] = [None, True, 0, -1, 512, 2**63, 2**64, 10**20 - 1, 1.5, "", "x" * 200, "row number 0", [], {}]
LEAVES += [[512], [1] * 128, [1] * 127, ["x"], [[1]], {"5": 1e9}, {"x": 1}, {"role": "user"}, {"prompt_token_ids": [1]}]


def changed(rng: random.Random, line: bytes) -> bytes:
    """A line that is still JSON, with another value or without a key somewhere."""
    try:
        root = json.loads(line)
    except (ValueError, RecursionError):
        return line
    node = root
    while isinstance(node, dict | list) and node:
        key: Any = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        inner = node[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.7:
            node = inner
            continue
        if rng.random() < 0.2:
            del node[key]
        elif isinstance(node, dict) and rng.random() < 0.5:
            node[rng.choice([*sorted(SAMPLING_FIELDS), "prompt", key + "s"])] = rng.choice(LEAVES)
        else:
            node[key] = rng.choice(LEAVES)
        break
    return json.dumps(root).encode()


MUTATORS: list[Callable[[random.Random, bytes], bytes]] = [
    lambda rng, line: line[: rng.randrange(len(line) + 1)],
    lambda rng, line: line[rng.randrange(len(line) + 1) :],
    lambda rng, line: insert(line, rng.randrange(len(line) + 1), rng.choice(PIECES)),
    lambda rng, line: rng.choice(PIECES) + line,
    lambda rng, line: line + rng.choice(PIECES),
    lambda rng, line: in_place_of_a_value(rng, line, rng.choice(VALUES)),
    lambda rng, line: bytes(byte ^ (1 << rng.randrange(8)) if rng.random() < 0.02 else byte for byte in line),
    lambda rng, line: line[: (at := rng.randrange(len(line) + 1))] + line[at + rng.randrange(6) :],
    lambda rng, line: line + line,
    lambda rng, line: b"[" + line + b"]",
    lambda rng, line: line.decode(errors="replace").encode("utf-16"),
    changed,
    changed,
    changed,
]


def mutated(rng: random.Random, line: bytes) -> bytes:
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        line = rng.choice(MUTATORS)(rng, line)
    return line.replace(b"\n", b"")


@dataclass(frozen=True)
class Expected:
    """A row as splitting the file at its line feeds finds it."""

    number: int
    byte_offset: int
    data: bytes


def split(data: bytes) -> list[Expected]:
    rows, offset = [], 0
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            rows.append(Expected(number, offset, line))
        offset += len(line) + 1
    return rows


def is_plain_object(data: bytes) -> bool:
    """Whether a line is one JSON object, NaN and Infinity excluded."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        return isinstance(json.loads(data.decode(), parse_constant=refuse), dict)
    except (ValueError, RecursionError):
        return False


def check_file(path: Path, data: bytes, rules: RequestDefaults) -> tuple[set[int], list[str]]:
    """Read a file both times that a job does; the rows that can be answered, and the codes of the others."""
    path.write_bytes(data)
    expected = split(data)
    bad: dict[int, str] = {}
    numbers = []

    def on_bad_row(row: FinishedRow, error: BadRow, source: InputRow) -> None:
        assert row.index == source.index
        assert row.index not in bad, "two errors of one row"
        shown = json.loads(row.data)["error"]
        assert (shown["line"], shown["byte_offset"]) == (expected[row.index].number, expected[row.index].byte_offset)
        assert shown["code"] == error.code
        assert error.code in CODES, "a code that the document does not explain"
        assert 0 < len(error.message) <= MAX_MESSAGE_CHARS + 3
        assert row.data.endswith(b"\n")
        bad[row.index] = error.code

    ids = CustomIdIndex(path.with_suffix(".sqlite"))
    summary = validate_input(
        job_input(path),
        rules,
        ids,
        on_good_row=lambda index, payload: None,
        on_bad_row=on_bad_row,
        on_row=lambda summary: numbers.append(summary.num_rows),
    )
    ids.close()
    assert numbers == list(range(1, len(expected) + 1))
    assert (summary.num_rows, summary.num_bad_rows) == (len(expected), len(bad))
    good, custom_ids = set(), set()
    for source in job_input(path).rows():
        line = source.source
        assert isinstance(line, InputLine)
        assert data[line.byte_offset :].startswith(line.data)
        if source.index not in bad:
            row = read_row(source, rules)
            assert is_plain_object(line.data)
            assert COMMANDS.decode(COMMANDS.encode(row.request)) == row.request
            good.add(source.index)
            custom_ids.add(row.custom_id)
    assert good | bad.keys() == set(range(len(expected)))
    assert len(custom_ids) == len(good)
    return good, list(bad.values())


def test_damaged_lines_are_errors_and_their_neighbours_rows(tmp_path: Path, rules: RequestDefaults) -> None:
    found: set[str] = set()
    num_good = 0
    for seed in range(NUM_FILES):
        rng = random.Random(seed)
        lines, intact = [valid_line(2, "the first")], [True]  # which says that the file is one of JSON lines
        for number in range(NUM_LINES):
            line = valid_line(rng.randrange(10), f"row number {number}")
            damaged = mutated(rng, line) if rng.random() < 0.6 else line
            lines.append(damaged)
            intact.append(damaged == line)
        data = b"".join(line + rng.choice([b"\n", b"\n", b"\r\n", b"\n\n", b"\n \t\n"]) for line in lines)
        if rng.random() < 0.5:
            data = data.rstrip(b"\n")
        good, codes = check_file(tmp_path / "in.jsonl", data, rules)
        rows = [line for line in lines if line.strip()]
        is_intact = [whole for line, whole in zip(lines, intact, strict=True) if line.strip()]
        assert len(rows) == len(good) + len(codes), f"seed {seed}"
        assert {i for i, whole in enumerate(is_intact) if whole} <= good, f"seed {seed}"
        found.update(codes)
        num_good += len(good)
    assert found >= {
        *("invalid_json", "invalid_utf8", "byte_order_mark", "nul_byte", "nested_too_deep", "non_finite_number"),
        *("number_too_large", "duplicate_key", "invalid_unicode", "unknown_field", "invalid_type", "not_an_object"),
        *(
            "invalid_parameter",
            "token_out_of_vocabulary",
            "context_length_exceeded",
            "missing_prompt",
            "duplicate_custom_id",
        ),
    }
    assert num_good > NUM_FILES


LINES = st.one_of(
    st.builds(valid_line, st.integers(0, 9), st.text(max_size=3)),
    st.builds(lambda seed, kind: mutated(random.Random(seed), valid_line(kind, "x")), st.integers(), st.integers(0, 9)),
    st.binary(max_size=30),
)


@given(parts=st.lists(st.tuples(LINES, st.sampled_from([b"\n", b"\r\n", b"\n\n"])), max_size=5), cut=st.integers(0, 4))
@settings(max_examples=200, deadline=None)
def test_any_file_is_rows_and_errors(
    tmp_path_factory: pytest.TempPathFactory,
    rules: RequestDefaults,
    parts: list[tuple[bytes, bytes]],
    cut: int,
) -> None:
    data = valid_line(2, "the first") + b"\n" + b"".join(line + ending for line, ending in parts)
    check_file(tmp_path_factory.getbasetemp() / "any.jsonl", data[: len(data) - cut], rules)
