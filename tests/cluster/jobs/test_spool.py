"""Rows that were checked come back as they were; a file that was changed is refused."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.cluster.jobs.input.bad_row import Place
from shoal.cluster.jobs.rows import BatchRow
from shoal.cluster.jobs.spool import RowSpoolWriter, encode_row, read_spool
from shoal.cluster.openai.requests import ENDPOINTS, ParsedRequest
from shoal.runtime.chat.prompt import OutputFormat
from shoal.runtime.types import SamplingParams

PARAMS = st.builds(
    SamplingParams,
    n=st.integers(1, 1024),
    temperature=st.floats(0, 100),
    top_p=st.floats(0.001, 1),
    max_tokens=st.none() | st.integers(1, 2**40),
    stop=st.lists(st.text(min_size=1, max_size=5), max_size=3),
    stop_token_ids=st.lists(st.integers(0, 200_000), max_size=3),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    logprobs=st.none() | st.integers(0, 20),
    logit_bias=st.none() | st.dictionaries(st.integers(0, 200_000), st.floats(-100, 100), max_size=3),
    stop_in_reasoning=st.booleans(),
)
TOOLS = st.fixed_dictionaries({"type": st.just("function"), "function": st.dictionaries(st.text(), st.integers(-9, 9))})
OUTPUT_FORMATS = st.builds(
    OutputFormat,
    grammar=st.text(),
    start=st.sampled_from(["reasoning", "content", "auto"]),
    tools=st.lists(TOOLS, max_size=2).map(tuple),
    reasoning_end_token_id=st.none() | st.integers(0, 200_000),
)
REQUESTS = st.builds(
    ParsedRequest,
    endpoint=st.sampled_from(ENDPOINTS),
    prompt_token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=5).map(tuple),
    params=PARAMS,
    num_logprobs=st.none() | st.integers(0, 20),
    output_format=st.none() | OUTPUT_FORMATS,
)


def batch_row(index: int, parsed: ParsedRequest) -> BatchRow:
    return BatchRow(
        index=index,
        place=Place("line", 3 * index, 2**40 + index, None if index % 2 else "ü.jsonl"),
        custom_id=f"ü{index}",
        parsed=parsed,
        kept=b'{"a": 1}' if index % 3 else b"",
    )


def write(path: Path, rows: list[BatchRow]) -> None:
    writer = RowSpoolWriter(path)
    for row in rows:
        writer.add(row.index, encode_row(row))
    assert not path.exists(), "it has its name once it is whole"
    writer.finish()
    writer.discard()
    assert path.exists()


@given(requests=st.lists(REQUESTS, max_size=5), data=st.data())
@settings(max_examples=50, deadline=None)
def test_rows_come_back_in_order(
    tmp_path_factory: pytest.TempPathFactory, requests: list[ParsedRequest], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("spool") / "rows.spool"
    rows = [batch_row(2 * i, parsed) for i, parsed in enumerate(requests)]
    write(path, rows)
    assert list(read_spool(path, skip=lambda index: False)) == rows
    skipped = data.draw(st.sets(st.sampled_from([r.index for r in rows]))) if rows else set()
    assert list(read_spool(path, skip=skipped.__contains__)) == [r for r in rows if r.index not in skipped]


def example() -> ParsedRequest:
    return ParsedRequest(
        endpoint="/v1/completions", prompt_token_ids=(1, 2, 3), params=SamplingParams(), num_logprobs=None
    )


def test_every_changed_byte_and_every_cut_is_found(tmp_path: Path) -> None:
    path = tmp_path / "rows.spool"
    write(path, [batch_row(i, example()) for i in range(2)])
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"rows\.spool is damaged at byte \d+; delete it and run again"):
            list(read_spool(path, skip=lambda index: False))
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is damaged"):
            list(read_spool(path, skip=lambda index: False))


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.spool"
    (tmp_path / "rows.spool.new").symlink_to("/dev/full")
    writer = RowSpoolWriter(path)
    writer.add(0, encode_row(batch_row(0, example())))
    with pytest.raises(OSError, match="No space") as error:
        writer.finish()
    assert error.value.errno == errno.ENOSPC
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_what_was_left_of_an_earlier_try_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "rows.spool"
    (tmp_path / "rows.spool.new").write_bytes(b"x" * 1000)
    path.write_bytes(b"old")
    rows = [batch_row(0, example())]
    writer = RowSpoolWriter(path)
    writer.add(0, encode_row(rows[0]))
    writer.finish()
    assert list(read_spool(path, skip=lambda index: False)) == rows
