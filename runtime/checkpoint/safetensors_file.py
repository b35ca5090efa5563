"""The header of one safetensors file: parsed, and checked against the file's size.

    | 8 bytes: n, little endian | n bytes: JSON {name: {dtype, shape, data_offsets}} | tensor data |

The safetensors library checks the same when it opens a file, but maps the file and gives no offsets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Location of one tensor; `begin` and `end` count bytes from `data_start`, where the file's tensor data begins."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    data_start: int
    begin: int
    end: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Parse and check one file's header; a ValueError names the file and the tensor that is wrong.

    The tensors must fill the data part exactly: inside the file, without overlap, without gaps.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or num_bytes > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(
                f"{path} is not a safetensors file, or it is cut short: {_length_problem(size, num_bytes)}"
            )
        raw = file.read(num_bytes)
    data_start = 8 + num_bytes
    entries = [
        _parse_entry(path, name, value, data_start)
        for name, value in _parse_json(path, raw).items()
        if name != "__metadata__"
    ]
    _check_layout(path, entries, size - data_start)
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


def _parse_entry(path: Path, name: str, value: object, data_start: int) -> TensorEntry:
    """One tensor of a header; its byte count must be what dtype and shape make it."""
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
    return TensorEntry(name, path, _DTYPES[dtype], tuple(shape), data_start, begin, end)


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
