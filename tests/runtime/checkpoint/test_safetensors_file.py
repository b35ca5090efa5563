"""Headers of safetensors files, valid and broken."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from shoal.runtime.checkpoint.safetensors_file import read_header


def write_file(path: Path, header: object, data: bytes = b"") -> Path:
    """A safetensors file with any header, valid or not."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(begin: int, end: int, **changes: Any) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]} | changes


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 4)}, b"1234", None),
        ({"a": entry(0, 4), "__metadata__": {"format": "pt"}}, b"1234", None),
        ({"a": entry(0, 0)}, b"", None),
        ({"a": entry(0, 4)}, b"123", "cut short: a ends at byte 4 of the data, the file has 3"),
        ({"a": entry(0, 4)}, b"12345", "1 bytes after its last tensor"),
        ({"a": entry(0, 4), "b": entry(2, 6)}, b"123456", "b overlaps the tensor before it"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, b"1234", "b overlaps the tensor before it"),
        ({"a": entry(1, 4)}, b"1234", "a leaves a gap"),
        ({"a": entry(0, 4, dtype="F99")}, b"1234", "a has dtype 'F99'"),
        ({"a": entry(0, 4, dtype=["U8"])}, b"1234", "a has dtype"),
        ({"a": entry(0, 4, shape=[-4])}, b"1234", r"a has shape \[-4\]"),
        ({"a": entry(0, 4, shape=[True])}, b"1234", r"a has shape \[True\]"),
        ({"a": entry(0, 4, shape=[2, 3])}, b"1234", r"a is U8 \[2, 3\] but has 4 bytes"),
        ({"a": entry(0, 4, shape=[2**62, 2**62])}, b"1234", "but has 4 bytes"),
        ({"a": entry(0, 4, data_offsets=[4, 0])}, b"1234", "but has -4 bytes"),
        ({"a": entry(0, 4, data_offsets=[0])}, b"1234", "data_offsets"),
        ({"a": 1}, b"", "a has dtype None"),
        ([], b"", "not a JSON object"),
        (b'{"a": ', b"", "not valid JSON"),
        (b'{"a": 1, "a": 2}', b"", "a name appears twice"),
        (b"[" * 100_000, b"", "not valid JSON"),
        (b"\xff", b"", "not valid JSON"),
    ],
)
def test_header_is_checked(tmp_path: Path, header: object, data: bytes, message: str | None) -> None:
    path = write_file(tmp_path / "model.safetensors", header, data)
    if message is None:
        assert set(read_header(path).tensors) == {"a"}
        return
    with pytest.raises(ValueError, match=f"model.safetensors.*{message}"):
        read_header(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: its download did not finish; download it again"),
        (b"\xff\xfe1234", "6 bytes in all"),
        (struct.pack("<Q", 3) + b"{}", "header claims 3 bytes, 2 are possible"),
        (struct.pack("<Q", 2**63) + b"{}", "header claims 9223372036854775808 bytes"),
    ],
)
def test_header_length_is_bounded(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_header(path)


def test_header_length_limit_does_not_depend_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(1 << 30)  # sparse: takes no space
    with pytest.raises(ValueError, match="claims 100000001 bytes, 100000000 are possible"):
        read_header(path)
