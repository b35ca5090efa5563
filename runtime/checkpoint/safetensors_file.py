"""Parses the header of a safetensors file and checks it against the file's size.

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

from .file_kinds import describe_file

MAX_HEADER_BYTES = 100_000_000
"""Bound on the length of a header, as in the safetensors library."""

_DTYPES = {
    "C64": torch.complex64,
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_PACKED_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Dtypes smaller than a byte, which are not read."""
_NUM_BITS = {name: dtype.itemsize * 8 for name, dtype in _DTYPES.items()} | _PACKED_BITS


class FileVersion(NamedTuple):
    """State of a file on disk, equal only while its content is unchanged.

    Writing to a file, or putting another in its place, sets the ctime, which programs cannot set back as they can the
    mtime. Two writes within the clock's granularity (milliseconds) cannot be told apart. The inode is left out: some
    network file systems number a file anew while it is in use.
    """

    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, descriptor: int) -> FileVersion:
        """The version of an open file."""
        status = os.fstat(descriptor)
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


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


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """Contents of one file."""

    tensors: dict[str, TensorEntry]
    unsupported: dict[str, str]
    """Dtypes of the tensors that cannot be read, by name."""


def read_header(path: Path) -> SafetensorsHeader:
    """Parse and check one file's header; a ValueError names the file and the tensor that is wrong.

    The tensors must fill the data part exactly: inside the file, without overlap, without gaps.
    """
    try:
        with path.open("rb") as opened:
            version = FileVersion.of(opened.fileno())
            num_bytes = int.from_bytes(opened.read(8), "little")
            if version.size < 8 or not 0 < num_bytes <= min(MAX_HEADER_BYTES, version.size - 8):
                raise ValueError(f"{path} {describe_file(path) or _length_problem(version.size, num_bytes)}")
            header = _parse_json(path, opened.read(num_bytes))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    header.pop("__metadata__", None)
    file = SafetensorsFile(path, version, data_start=8 + num_bytes)
    fields = [_parse_entry(path, name, value) for name, value in header.items()]
    _check_layout(path, fields, version.size - file.data_start)
    return SafetensorsHeader(
        tensors={
            name: TensorEntry(name, file, _DTYPES[dtype], shape, begin, end)
            for begin, end, name, dtype, shape in fields
            if dtype in _DTYPES
        },
        unsupported={field.name: field.dtype for field in fields if field.dtype not in _DTYPES},
    )


def reject_duplicate_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` for JSON: ValueError for an object that has a name twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _length_problem(size: int, num_bytes: int) -> str:
    problem = f"its header claims {num_bytes} bytes, {min(MAX_HEADER_BYTES, size - 8)} are possible"
    if size < 8:
        problem = f"it has {size} bytes in all"
    return f"is not a safetensors file, or it is cut short: {problem}; download it again"


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


class _Fields(NamedTuple):
    """One tensor of a header, in the order in which tensors lie in the file."""

    begin: int
    end: int
    name: str
    dtype: str
    shape: tuple[int, ...]


def _parse_entry(path: Path, name: str, value: object) -> _Fields:
    """One tensor of a header; its byte count must be what dtype and shape make it."""
    fields = value if isinstance(value, dict) else {}
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    dtype = fields.get("dtype")
    if not isinstance(dtype, str) or dtype not in _NUM_BITS:
        raise ValueError(f"{path}: {name} has dtype {dtype!r}, which is not one of {', '.join(_NUM_BITS)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{path}: {name} has shape {shape!r} and data_offsets {offsets!r}; download the file again")
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * _NUM_BITS[dtype]:
        raise ValueError(f"{path}: {name} is {dtype} {shape} but has {end - begin} bytes; download the file again")
    return _Fields(begin, end, name, dtype, tuple(shape))


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _check_layout(path: Path, tensors: Iterable[_Fields], num_bytes: int) -> None:
    """ValueError unless the tensors fill the `num_bytes` bytes of tensor data, one directly after the other."""
    end = 0
    for tensor in sorted(tensors):
        if tensor.begin != end:
            kind = "overlaps the tensor before it" if tensor.begin < end else "leaves a gap before it"
            raise ValueError(
                f"{path}: {tensor.name} {kind} (starts at byte {tensor.begin}, expected {end}); download the file again"
            )
        end = tensor.end
        if end > num_bytes:
            raise ValueError(
                f"{path} is cut short: {tensor.name} ends at byte {end} of the data, the file has {num_bytes}; "
                "download it again"
            )
    if end != num_bytes:
        raise ValueError(f"{path} has {num_bytes - end} bytes after its last tensor; download it again")
