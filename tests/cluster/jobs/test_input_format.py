"""Files that are not JSON lines are named as a whole; compressed ones and a byte order mark are read."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from shoal.cluster.jobs.input.custom_ids import CustomIdIndex
from shoal.cluster.jobs.input.formats import GIVE, has_byte_order_mark
from shoal.cluster.jobs.input.lines import parse_line, read_lines
from tests.support.batch_input import input_file

ROWS = b'{"prompt": "a"}\n{"prompt": "b"}\n'


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("in.jsonl", ROWS)
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo("in.jsonl")
        entry.size = len(ROWS)
        archive.addfile(entry, io.BytesIO(ROWS))
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"ARROW1\0\0" + bytes(64), "an Arrow file"),
        (b"\xff\xff\xff\xff\x78\1\0\0\x10\0\0\0" + bytes(64), "an Arrow file"),
        (b"Obj\x01\x04", "an Avro file"),
        (b"SQLite format 3\0", "an SQLite database"),
        (zstandard.compress(gzip.compress(ROWS)), "compressed twice"),
        (gzip.compress(zstandard.compress(ROWS)), "compressed twice"),
        (bz2.compress(ROWS), "compressed with bzip2"),
        (lzma.compress(ROWS), "compressed with xz"),
        (gzip.compress(gzip.compress(ROWS)), "compressed twice"),
        (gzip.compress(b"PAR1 and more"), "a Parquet file within a compressed one"),
        (zipped(), "a zip archive"),
        (tarred(), "a tar archive"),
        (ROWS.decode().encode("utf-16"), "UTF-16 text"),
        (ROWS.decode().encode("utf-16-le"), "UTF-16 text"),
        (ROWS.decode().encode("utf-16-be"), "UTF-16 text"),
        (ROWS.decode().encode("utf-32"), "UTF-32 text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html>\n<html><body>404</body></html>\n", "an HTML or XML document"),
        (b'\n  <?xml version="1.0"?>\n<Error/>\n', "an HTML or XML document"),
        (b"%PDF-1.7\n", "a PDF document"),
        (json.dumps([{"prompt": "a"}, {"prompt": "b"}]).encode(), "one JSON array"),
        (json.dumps([{"prompt": "a"}], indent=2).encode(), "one JSON array"),
        (b"\xef\xbb\xbf" + json.dumps([{"prompt": "a"}]).encode(), "one JSON array"),
        (json.dumps({"prompt": "a", "max_tokens": 1}, indent=2).encode(), "one JSON document over several lines"),
        (b"custom_id,prompt\na,hello\nb,hi\n", "a table (CSV)"),
        (b'"id";"prompt"\r\n"a";"hello"\r\n', "a table (CSV)"),
        (b"prompt: hello\n" * 20, "text of another kind"),
    ],
    ids=lambda value: value if isinstance(value, str) else "data",
)
def test_a_file_of_another_kind_is_named(tmp_path: Path, data: bytes, kind: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(data)
    end = re.escape(f"give {GIVE}")
    with pytest.raises(ValueError, match=rf"^{re.escape(f'{path} is {kind}')}.*; {end}$"):
        list(read_lines(input_file(path)))


@pytest.mark.parametrize(
    "data", [b"", b"\n\n", b'["a", "b"]\n', b"{\n", b"nonsense\n", b"null\n[1]\n", b'{"a": 1}\nx,y\n']
)
def test_bad_rows_are_not_another_kind_of_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(data)
    assert [line.data for line in read_lines(input_file(path))] == [line for line in data.split(b"\n") if line]


def test_gzip_needs_no_suffix(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(gzip.compress(ROWS[:16]) + gzip.compress(ROWS[16:]))
    assert [line.data for line in read_lines(input_file(path))] == ROWS.splitlines()


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress])
def test_a_byte_order_mark_at_the_start_is_skipped(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(compress(b"\xef\xbb\xbf" + ROWS))
    assert [parse_line(line) for line in read_lines(input_file(path))] == [{"prompt": "a"}, {"prompt": "b"}]
    assert [line.byte_offset for line in read_lines(input_file(path))] == [3, 19]
    assert has_byte_order_mark(input_file(path))
    path.write_bytes(compress(ROWS))
    assert not has_byte_order_mark(input_file(path))


def test_the_index_of_custom_ids_reports_the_systems_own_error(tmp_path: Path) -> None:
    """A job ends with 75 when there is no room, wherever it notices that."""
    with pytest.raises(FileNotFoundError):
        CustomIdIndex(tmp_path / "none" / "ids.sqlite")


def test_an_index_that_cannot_be_created_is_an_oserror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = tmp_path / "ids.sqlite"
    connect = sqlite3.connect

    def without_room(*args: Any, **options: Any) -> sqlite3.Connection:
        db: sqlite3.Connection = connect(*args, **options)
        db.execute("PRAGMA max_page_count=1")
        return db

    monkeypatch.setattr(sqlite3, "connect", without_room)
    with pytest.raises(OSError, match="No space left on device"):
        CustomIdIndex(full)
