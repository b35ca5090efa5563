from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import msgpack

from shoal.cluster.jobs.journal import MAGIC, Journal, ProgressRecord, Record, RowRecord
from shoal.runtime.types import GeneratedTokens, Logprob

TOKENS = st.integers(0, 2**31)
POSITIONS = st.dictionaries(TOKENS, st.builds(Logprob, st.floats(allow_nan=False), TOKENS), min_size=1, max_size=3)
progress_records = st.builds(
    ProgressRecord,
    index=st.integers(0, 2**40),
    sample_index=st.integers(0, 1000),
    start=st.integers(0, 2**31),
    new=st.builds(
        GeneratedTokens,
        token_ids=st.lists(TOKENS, max_size=4).map(tuple),
        logprobs=st.none() | st.lists(POSITIONS, max_size=4).map(tuple),
    ),
)
records = progress_records | st.builds(
    RowRecord,
    index=st.integers(0, 2**40),
    failed=st.booleans(),
    end_offset=st.integers(0, 2**50),
    digest=st.binary(min_size=32, max_size=32),
    num_prompt_tokens=st.integers(0, 2**31),
    num_output_tokens=st.integers(0, 2**31),
)


def replayed(path: Path) -> tuple[list[Record], int]:
    found: list[Record] = []
    journal = Journal(path, found.append)
    journal.close()
    return found, journal.num_dropped_bytes


def record(index: int) -> RowRecord:
    return RowRecord(index, False, index * 10, bytes(32), 1, 2)


def test_records_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    first = Journal(path, lambda _: None)
    first.append([record(3), record(1)])
    first.append([record(2)])
    first.close()
    second = Journal(path, lambda _: None)
    second.append([record(9)])
    second.close()
    assert replayed(path) == ([record(3), record(1), record(2), record(9)], 0)


@given(groups=st.lists(st.lists(records, min_size=1, max_size=4), max_size=4), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_torn_file_keeps_every_whole_record(
    tmp_path_factory: pytest.TempPathFactory, groups: list[list[Record]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.log"
    journal = Journal(path, lambda _: None)
    ends = [path.stat().st_size]
    for group in groups:
        for one in group:
            journal.append([one])
            ends.append(path.stat().st_size)
    journal.close()
    everything = [one for group in groups for one in group]
    cut = data.draw(st.integers(0, ends[-1]))
    os.truncate(path, cut)
    whole = sum(end <= cut for end in ends[1:])
    found, dropped = replayed(path)
    assert found == everything[:whole]
    assert dropped == (cut - ends[whole] if cut >= len(MAGIC) else cut)
    # What is appended after the repair is found behind what survived.
    journal = Journal(path, lambda _: None)
    journal.append([record(5)])
    journal.close()
    assert replayed(path) == ([*everything[:whole], record(5)], 0)


@given(position=st.integers(len(MAGIC), len(MAGIC) + 299), flip=st.integers(1, 255))
@settings(max_examples=50, deadline=None)
def test_a_flipped_byte_ends_the_journal_there(
    tmp_path_factory: pytest.TempPathFactory, position: int, flip: int
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.log"
    journal = Journal(path, lambda _: None)
    journal.append([record(i) for i in range(20)])
    journal.close()
    content = bytearray(path.read_bytes())
    size = (len(content) - len(MAGIC)) // 20
    content[position] ^= flip
    path.write_bytes(content)
    found, dropped = replayed(path)
    num_intact = (position - len(MAGIC)) // size
    assert found == [record(i) for i in range(num_intact)]
    assert dropped == len(content) - len(MAGIC) - num_intact * size


def test_a_failed_append_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.log"
    journal = Journal(path, lambda _: None)
    journal.append([record(1)])

    def no_space(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("shoal.cluster.jobs.journal.os.fsync", no_space)
        with pytest.raises(OSError, match="No space"):
            journal.append([record(2)])
    journal.close()
    assert replayed(path) == ([record(1)], 0)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr("shoal.cluster.jobs.journal.os.pwrite", lambda fd, data, offset: pwrite(fd, data[:5], offset))
    path = tmp_path / "journal.log"
    journal = Journal(path, lambda _: None)
    journal.append([record(i) for i in range(4)])
    journal.close()
    assert replayed(path) == ([record(i) for i in range(4)], 0)


@pytest.mark.parametrize("content", [b"something else", MAGIC[:-2] + b"02" + bytes(100)])
def test_a_file_that_is_no_journal_of_this_version_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "journal.log"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a journal of this version; use another output directory"):
        Journal(path, lambda _: None)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "payload",
    [
        b"\xc1",
        b"\x91" * 5000,
        b"\xdd\xff\xff\xff\xff",
        msgpack.encode(1),
        msgpack.encode([]),
        msgpack.encode([3, 1]),
        msgpack.encode([4, 1, 1]),
        msgpack.encode([[1], 2]),
        msgpack.encode([1, 2]),
        msgpack.encode([2, 0, 0, 0, 5]),
        msgpack.encode([2, 0, 0, 0, [[1], [[1, 2]]]]),
    ],
)
def test_an_intact_record_of_another_kind_is_refused(tmp_path: Path, payload: bytes) -> None:
    path = tmp_path / "journal.log"
    path.write_bytes(MAGIC + struct.pack("<II", len(payload), zlib.crc32(payload)) + payload)
    with pytest.raises(ValueError, match=r"journal\.log holds a record of another kind"):
        Journal(path, lambda _: None)
