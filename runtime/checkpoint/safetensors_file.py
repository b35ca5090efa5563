"""The header of one safetensors file: parsed, and checked against the file's size.

    | 8 bytes: n, little endian | n bytes: JSON {name: {dtype, shape, data_offsets}} | tensor data |

The safetensors library checks the same when it opens a file, but maps the file and gives no offsets.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

MAX_HEADER_BYTES = 100_000_000
"""Bound on the length of a header, as in the safetensors library."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class FileVersion(NamedTuple):
    """State of a file on disk, equal only while its content is unchanged.

    Writing to a file sets its ctime, which no program can set back as it can the mtime. Two writes within the clock's
    granularity (milliseconds) cannot be told apart.
    """

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, descriptor: int) -> FileVersion:
        """The version of an open file."""
        status = os.fstat(descriptor)
        return cls(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """One file as it was when its header was read."""

    path: Path
    version: FileVersion
    data_start: int
    """Bytes before the tensor data."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Location of one tensor; `begin` and `end` count bytes from the start of the file's tensor data."""

    name: str
    file: SafetensorsFile
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def path(self) -> Path:
        return self.file.path


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Parse and check one file's header; a ValueError names the file and the tensor that is wrong.

    The tensors must fill the data part exactly: inside the file, without overlap, without gaps.
    """
    with path.open("rb") as file:
        version = FileVersion.of(file.fileno())
        size = version.size
        num_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or num_bytes > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(
                f"{path} is not a safetensors file, or it is cut short: {_length_problem(size, num_bytes)}"
            )
        raw = file.read(num_bytes)
    header = _parse_json(path, raw)
    header.pop("__metadata__", None)
    opened = SafetensorsFile(path, version, data_start=8 + num_bytes)
    entries = [_parse_entry(opened, name, value) for name, value in header.items()]
    _check_layout(path, entries, size - opened.data_start)
    return {entry.name: entry for entry in entries}


def reject_duplicate_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` for JSON: ValueError for an object that has a name twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _length_problem(size: int, num_bytes: int) -> str:
    if size < 8:
        return f"{size} bytes in all"
    return f"its header claims {num_bytes} bytes, {min(MAX_HEADER_BYTES, size - 8)} are possible"


def _parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw, object_pairs_hook=reject_duplicate_names)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: the safetensors header is not valid JSON ({error}); download the file again"
        ) from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the safetensors header is not a JSON object; download the file again")
    return header


def _parse_entry(file: SafetensorsFile, name: str, value: object) -> TensorEntry:
    """One tensor of a header; its byte count must be what dtype and shape make it."""
    path = file.path
    fields = value if isinstance(value, dict) else {}
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    dtype = fields.get("dtype")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{path}: {name} has dtype {dtype!r}, which is not one of {', '.join(_DTYPES)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{path}: {name} has shape {shape!r} and data_offsets {offsets!r}; download the file again")
    begin, end = offsets
    if end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise ValueError(f"{path}: {name} is {dtype} {shape} but has {end - begin} bytes; download the file again")
    return TensorEntry(name, file, _DTYPES[dtype], tuple(shape), begin, end)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _check_layout(path: Path, entries: Iterable[TensorEntry], num_bytes: int) -> None:
    """ValueError unless the tensors fill the `num_bytes` bytes of tensor data, one directly after the other."""
    end = 0
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != end:
            kind = "overlaps the tensor before it" if entry.begin < end else "leaves a gap before it"
            raise ValueError(
                f"{path}: {entry.name} {kind} (starts at byte {entry.begin}, expected {end}); download the file again"
            )
        end = entry.end
        if end > num_bytes:
            raise ValueError(
                f"{path} is cut short: {entry.name} ends at byte {end} of the data, the file has {num_bytes}; "
                "download it again"
            )
    if end != num_bytes:
        raise ValueError(f"{path} has {num_bytes - end} bytes after its last tensor; download it again")
