"""Which files an input has, and what their formats are."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

import pytest
import zstandard

from shoal.cluster.jobs.input.bad_row import Place
from shoal.cluster.jobs.input.files import InputFile, find_files
from shoal.cluster.jobs.input.identity import input_fingerprint, recorded_files, restrict_files
from shoal.cluster.jobs.input.lines import read_lines
from tests.support.batch_input import input_file, job_input

FILES = ["b.jsonl", "a.jsonl.gz", "deep/c.parquet", "deep/er/d.ndjson.zst", "deep/e.jsonl"]
OTHERS = ["readme.md", ".a.jsonl", "_SUCCESS", "_tmp/f.jsonl", ".cache/g.jsonl", "deep/h.json"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in FILES + OTHERS:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "in"


def names(tree: Path, *entries: str, scheme: str = "") -> list[str]:
    found = find_files([f"{scheme}{tree}/{entry}" for entry in entries])
    return [file.url.removeprefix(f"{scheme}{tree}/") for file in found]


@pytest.mark.parametrize("scheme", ["", "file://"], ids=["path", "url"])
@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (["b.jsonl"], ["b.jsonl"]),
        (["readme.md"], ["readme.md"]),
        (["b.jsonl", "a.jsonl.gz"], ["b.jsonl", "a.jsonl.gz"]),
        (["deep"], ["deep/c.parquet", "deep/e.jsonl", "deep/er/d.ndjson.zst"]),
        ([""], ["a.jsonl.gz", "b.jsonl", "deep/c.parquet", "deep/e.jsonl", "deep/er/d.ndjson.zst"]),
        (["*.jsonl*"], ["a.jsonl.gz", "b.jsonl"]),
        (["deep/*"], ["deep/c.parquet", "deep/e.jsonl", "deep/h.json"]),
        (["**/*.jsonl"], ["_tmp/f.jsonl", "b.jsonl", "deep/e.jsonl"]),
        (["d?ep/[cd].*", "b.jsonl"], ["deep/c.parquet", "b.jsonl"]),
    ],
)
def test_the_files_of_entries(tree: Path, scheme: str, entries: list[str], expected: list[str]) -> None:
    assert names(tree, *entries, scheme=scheme) == expected
    if scheme == "":
        file = find_files([f"{tree}/deep/c.parquet"])[0]
        assert file == InputFile(str(tree / "deep/c.parquet"), len("deep/c.parquet"))


def test_names_that_a_url_encodes(tmp_path: Path) -> None:
    (tmp_path / "a b%é").mkdir()
    (tmp_path / "a b%é" / "c?d.jsonl").write_bytes(b"{}\n")
    for url in (f"file://{tmp_path}/a%20b%25%C3%A9", f"file://{tmp_path}/a%20b%25%C3%A9/*.jsonl"):
        (found,) = find_files([url])
        assert found.url == f"file://{tmp_path}/a%20b%25%C3%A9/c%3Fd.jsonl"
        assert len(list(read_lines(found))) == 1


def test_a_url_is_read_as_the_file_is(tree: Path) -> None:
    path = tree / "b.jsonl"
    path.write_bytes(b'{"prompt": "x"}\n')
    (there,) = find_files([f"file://{path}"])
    assert list(read_lines(there)) == list(read_lines(input_file(path)))
    before = there.fingerprint()
    path.write_bytes(b'{"prompt": "xy"}\n')
    assert find_files([f"file://{path}"])[0].fingerprint() != before


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "the input is an empty list"),
        (["none.jsonl"], r"none\.jsonl is not a file, a directory or a pattern that some file matches"),
        (["none*"], r"none\* has no file"),
        (["_tmp"], None),
        ([".cache/.."], None),
        (["b.jsonl", "*.jsonl"], r"b\.jsonl is given twice"),
    ],
)
def test_entries_that_cannot_be_an_input(tree: Path, entries: list[str], message: str | None) -> None:
    if message is None:
        assert names(tree, *entries)
        return
    with pytest.raises(ValueError, match=message):
        names(tree, *entries)


def test_a_directory_without_inputs_says_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("a,b\n")
    for scheme in ("", "file://"):
        with pytest.raises(ValueError, match=r"has no file; in a directory they end in \.jsonl, .*\.parquet"):
            find_files([f"{scheme}{tmp_path}"])


def test_a_scheme_that_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read the input ftp://host/a.jsonl"):
        find_files(["ftp://host/a.jsonl"])


def test_a_pattern_of_buckets_is_refused() -> None:
    with pytest.raises(ValueError, match="has a pattern where the bucket stands; name the bucket"):
        find_files(["s3://*/a.jsonl"])


def test_object_stores_need_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.fs", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=re.escape("reading s3://b/a.jsonl needs pyarrow")):
        find_files(["s3://b/a.jsonl"])
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=re.escape("a.parquet needs pyarrow: pip install 'shoal[data]'")):
        list(job_input(tmp_path / "a.parquet").rows())


def rows_of(*paths: Path) -> list[tuple[int, Place]]:
    return [(row.index, row.place) for row in job_input(*paths).rows()]


def test_rows_of_several_files_have_one_order_and_say_where_they_are(tmp_path: Path) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    a.write_text('{"prompt": "x"}\n\n{"prompt": "y"}')
    b.write_text('{"prompt": "z"}\n')
    assert rows_of(a) == [(0, Place("line", 1, 0)), (1, Place("line", 3, 17))]
    assert rows_of(b, a) == [
        (0, Place("line", 1, 0, str(b))),
        (1, Place("line", 1, 0, str(a))),
        (2, Place("line", 3, 17, str(a))),
    ]
    assert str(Place("line", 3, 17, "a.jsonl")) == "line 3 of a.jsonl"
    assert Place("line", 3, 17, "a.jsonl").facts() == {"file": "a.jsonl", "line": 3, "byte_offset": 17}
    assert Place("row", 3).facts() == {"row": 3}


class TestZstandard:
    text = b"".join(b'{"prompt": "row %d"}\n' % (i * i) for i in range(5000))

    def test_frames_one_after_the_other(self, tmp_path: Path) -> None:
        rng = random.Random(0)
        cuts = sorted(rng.sample(range(len(self.text)), 7))
        pieces = [self.text[a:b] for a, b in zip([0, *cuts], [*cuts, len(self.text)], strict=True)]
        (tmp_path / "in").write_bytes(b"".join(map(zstandard.compress, [*pieces, b""])))
        (tmp_path / "plain").write_bytes(self.text)
        assert list(read_lines(input_file(tmp_path / "in"))) == list(read_lines(input_file(tmp_path / "plain")))

    @pytest.mark.parametrize("cut", [5, 100, 5000, -1, -4])
    def test_one_that_is_cut_off_is_damaged(self, tmp_path: Path, cut: int) -> None:
        (tmp_path / "in.jsonl.zst").write_bytes(zstandard.compress(self.text)[:cut])
        with pytest.raises(ValueError, match=r"in.jsonl.zst: the compressed data is damaged after line"):
            list(read_lines(input_file(tmp_path / "in.jsonl.zst")))

    def test_what_follows_a_frame_must_be_one(self, tmp_path: Path) -> None:
        (tmp_path / "in.jsonl.zst").write_bytes(zstandard.compress(self.text) + b"more")
        with pytest.raises(ValueError, match="the compressed data is damaged after line 5000"):
            list(read_lines(input_file(tmp_path / "in.jsonl.zst")))

    def test_data_that_grows_a_lot_is_read_piece_by_piece(self, tmp_path: Path) -> None:
        """64 MiB of blanks in a few kilobytes."""
        (tmp_path / "in.jsonl.zst").write_bytes(zstandard.compress(b"{}\n" + b" " * (64 << 20) + b"\n{}"))
        lines = list(read_lines(input_file(tmp_path / "in.jsonl.zst")))
        assert [(line.number, line.num_bytes, len(line.data)) for line in lines] == [
            (1, 2, 2),
            (2, 64 << 20, 0),
            (3, 2, 2),
        ]


class TestGrownInputs:
    @staticmethod
    def recorded(files: list[InputFile]) -> tuple[list[dict[str, object]], str]:
        return json.loads(json.dumps(recorded_files(files))), input_fingerprint(files)

    def test_what_was_appended_and_what_is_new_is_not_read(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text("{}\n")
        (tmp_path / "c.jsonl").write_text("{}\n{}\n")
        files = find_files([str(tmp_path)])
        recorded, fingerprint = self.recorded(files)
        assert restrict_files(files, recorded, fingerprint, pytest.fail) is None
        with (tmp_path / "c.jsonl").open("a") as file:
            file.write("{}\n")
        (tmp_path / "b.jsonl").write_text("{}\n")
        said: list[str] = []
        assert restrict_files(find_files([str(tmp_path)]), recorded, fingerprint, said.append) == files
        assert said == [
            f"{tmp_path}/c.jsonl has grown by 3 bytes since the job was started: they are not read",
            "1 input files have come since the job was started: they are not read",
        ]

    def test_a_file_that_changed_is_another_input(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"prompt": "x"}\n')
        recorded, fingerprint = self.recorded(find_files([str(path)]))
        path.write_text('{"prompt": "y"}\n{}\n')
        assert restrict_files(find_files([str(path)]), recorded, fingerprint, pytest.fail) is None
        path.write_text("{}\n")
        assert restrict_files(find_files([str(path)]), recorded, fingerprint, pytest.fail) is None

    def test_the_same_content_elsewhere_is_the_same_input(self, tmp_path: Path) -> None:
        for directory in ("one", "two"):
            (tmp_path / directory).mkdir()
            for name in ("a", "b"):
                (tmp_path / directory / f"{name}{directory}.jsonl").write_text(name)
        one, two = (find_files([str(tmp_path / directory)]) for directory in ("one", "two"))
        assert input_fingerprint(one) == input_fingerprint(two) != input_fingerprint(two[::-1])
        assert input_fingerprint(one[:1]) == one[0].fingerprint()
