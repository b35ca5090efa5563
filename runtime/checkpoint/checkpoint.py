"""Reading a checkpoint: one or many *.safetensors files, checked before use and read slice by slice.

A safetensors file:

    | 8 bytes: n, little endian | n bytes: JSON {name: {dtype, shape, data_offsets}} | tensor data |
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from shoal.kernels.quant import BlockFP8Weight

from ..models.config import ModelConfig

MAX_HEADER_BYTES = 100_000_000
"""Bound on a safetensors header, as in the format's own library, and on the index file."""

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SCALE_SUFFIX = "_scale_inv"

_BLOCK = 128
_SAMPLE_BYTES = 4096
_READ_BYTES = 16 << 20
"""Read at a time of a matrix whose columns are cut."""
_NUM_NAMED = 5
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
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
    """Where one tensor lies; `begin` and `end` count bytes from the start of the file's tensor data, `data_start`."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    data_start: int
    begin: int
    end: int


class Checkpoint:
    """The tensors of a model directory, by name. Opening reads headers only; `read` copies one slice of one tensor.

    A directory holds `model.safetensors`, or `model.safetensors.index.json` and the files that it lists. Those may be
    symbolic links to anywhere, as in the cache of Hugging Face: who made the directory chose them, not the index.
    Every ValueError names the file, and the tensor where there is one.
    """

    def __init__(self, model_dir: str | Path) -> None:
        self.model_dir = Path(model_dir)
        self._open_files: dict[Path, tuple[FileIO, dict[str, TensorEntry]]] = {}
        index = self.model_dir / INDEX_FILE
        if index.exists():
            self._entries = _read_shards(index)
        elif (single := self.model_dir / SINGLE_FILE).exists():
            self._entries = read_header(single)
        else:
            raise ValueError(f"{self.model_dir} has neither {SINGLE_FILE} nor {INDEX_FILE}{_hint(self.model_dir)}")

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype as stored."""
        return self._entry(name).dtype

    def read(
        self, name: str, *, rows: slice | None = None, cols: slice | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Copy `tensor[rows, cols]` into memory of its own, contiguous; nothing outside the slice is read or kept.

        rows, cols   contiguous ranges inside the tensor (cols: of a matrix); None is everything
        dtype        of the result; None keeps the stored one

        An FP8 matrix is returned as weights, W[i, j] * scale_inv[i // 128, j // 128], in bfloat16 unless `dtype` says
        otherwise; the scales come from its `<name>_scale_inv` sibling.
        """
        entry = self._entry(name)
        row_range = _range(name, "rows", rows, entry.shape, 0)
        col_range = _range(name, "cols", cols, entry.shape, 1)
        if entry.dtype is not torch.float8_e4m3fn:
            return self._copy(name, row_range, col_range, dtype or entry.dtype)
        # Scales start at block boundaries: columns are widened to one and cut after dequantising.
        assert col_range is not None
        first_col = col_range.start // _BLOCK * _BLOCK
        weight = self._copy_fp8(name, row_range, slice(first_col, col_range.stop))
        values = weight.dequantize(dtype or torch.bfloat16)
        return values[:, col_range.start - first_col :].contiguous()

    def read_fp8(self, name: str, *, rows: slice | None = None) -> BlockFP8Weight:
        """Rows of an FP8 matrix as they are stored, with their scales; `dtype(name)` says whether it is one."""
        return self._copy_fp8(name, _range(name, "rows", rows, self.shape(name), 0), slice(0, self.shape(name)[1]))

    def _copy_fp8(self, name: str, rows: slice | None, cols: slice) -> BlockFP8Weight:
        """`cols` start at a block boundary."""
        self._check_scale(name)
        assert rows is not None
        first = rows.start // _BLOCK
        scale_inv = self._copy(
            name + SCALE_SUFFIX,
            slice(first, math.ceil(rows.stop / _BLOCK)),
            slice(cols.start // _BLOCK, math.ceil(cols.stop / _BLOCK)),
            torch.float32,
        )
        values = self._copy(name, rows, cols, torch.float8_e4m3fn)
        if bool((values.view(torch.uint8) & 0x7F == 0x7F).any()):
            raise ValueError(f"{self._entry(name).path}: {name} contains NaN; download the file again")
        return BlockFP8Weight.of_rows(values, scale_inv, row_offset=rows.start - first * _BLOCK)

    def check_names(self, expected: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Refuse a checkpoint that lacks a tensor of `expected` or has it in another shape; reads no weights.

        Returns the names that nothing asked for, for a notice to the user (`mtp_names` tells some of them apart).
        Scales of expected FP8 matrices are not listed, nor are `rotary_emb.inv_freq` tables, which are computed anew.
        """
        missing = sorted(name for name in expected if name not in self._entries)
        if missing:
            raise ValueError(
                f"{self.model_dir} lacks {len(missing)} of {len(expected)} tensors of the model: {_some(missing)}"
            )
        wrong = sorted(name for name, shape in expected.items() if self._entries[name].shape != tuple(shape))
        if wrong:
            described = [
                f"{name} is {list(self.shape(name))}, expected {list(expected[name])}" for name in wrong[:_NUM_NAMED]
            ]
            raise ValueError(
                f"{self.model_dir}: {len(wrong)} tensors do not have the shape that config.json asks for: "
                f"{_some(described)}"
            )
        for name in expected:
            if self._entries[name].dtype is torch.float8_e4m3fn:
                self._check_scale(name)
            elif not self._entries[name].dtype.is_floating_point:
                raise ValueError(
                    f"{self._entries[name].path}: {name} is stored as {self.dtype(name)}, expected a float type"
                )
        known = set(expected) | {name + SCALE_SUFFIX for name in expected}
        return [name for name in self.names if name not in known and not name.endswith("rotary_emb.inv_freq")]

    def mtp_names(self, config: ModelConfig) -> list[str]:
        """The tensors of the multi-token prediction layers, which follow the model's own layers."""
        first = config.num_hidden_layers
        prefixes = tuple(f"model.layers.{first + i}." for i in range(config.num_nextn_predict_layers))
        return [name for name in self.names if name.startswith(prefixes)]

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) that tells checkpoints apart without reading them whole.

        Covers config.json, every tensor's name, dtype and shape, and of each file its size and the first and last 4 KiB
        of tensor data. Weights edited elsewhere in a file of the same size are not noticed.
        """
        hashed = hashlib.sha256()
        _update(hashed.update, [(self.model_dir / "config.json").read_bytes()])
        for name in self.names:
            entry = self._entries[name]
            _update(hashed.update, [name.encode(), str(entry.dtype).encode(), repr(entry.shape).encode()])
        for path in sorted({entry.path for entry in self._entries.values()}):
            size = path.stat().st_size
            with path.open("rb") as file:
                data_start = 8 + int.from_bytes(file.read(8), "little")
                file.seek(data_start)
                head = file.read(_SAMPLE_BYTES)
                file.seek(max(data_start, size - _SAMPLE_BYTES))
                tail = file.read(_SAMPLE_BYTES)
            _update(hashed.update, [str(size).encode(), head, tail])
        return hashed.hexdigest()

    def close(self) -> None:
        """Let go of the files; tensors already read stay valid."""
        for file, _ in self._open_files.values():
            file.close()
        self._open_files.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._entries:
            raise ValueError(f"{self.model_dir} has no tensor {name}")
        return self._entries[name]

    def _check_scale(self, name: str) -> None:
        """An FP8 matrix needs one float scale per block of 128 x 128, edge blocks included."""
        entry = self._entry(name)
        scale_name = name + SCALE_SUFFIX
        if len(entry.shape) != 2:
            raise ValueError(
                f"{entry.path}: {name} is FP8 with shape {list(entry.shape)}; only matrices have block scales"
            )
        if scale_name not in self._entries:
            raise ValueError(f"{entry.path}: {name} is FP8 but its scales, {scale_name}, are not in the checkpoint")
        scale = self._entries[scale_name]
        blocks = tuple(math.ceil(size / _BLOCK) for size in entry.shape)
        if scale.shape != blocks or scale.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"{scale.path}: {scale_name} is {scale.dtype} {list(scale.shape)}, expected float32 {list(blocks)} for "
                f"{name} {list(entry.shape)}"
            )

    def _copy(self, name: str, rows: slice | None, cols: slice | None, dtype: torch.dtype) -> Tensor:
        """The slice in fresh memory, converted on the way.

        Read, not mapped: pages of a mapped file count as this process's memory until the file is closed, and one that
        shrinks meanwhile would end the process.
        """
        entry = self._entry(name)
        try:
            file = self._file(entry, name)
            if not entry.shape:
                return _read(file, entry, 0, torch.empty(1, dtype=entry.dtype)).view(()).to(dtype)
            rows = rows or slice(0, entry.shape[0])
            num_rows = rows.stop - rows.start
            if cols is None or cols == slice(0, entry.shape[1]):
                return _read(file, entry, rows.start, _empty(entry, num_rows)).to(dtype)
            part = torch.empty(num_rows, cols.stop - cols.start, dtype=dtype)
            # one buffer for all pieces: the allocator need not find the room of a freed one again
            step = max(1, _READ_BYTES // (entry.shape[1] * entry.dtype.itemsize))
            buffer = _empty(entry, min(step, num_rows))
            first = rows.start
            for piece in torch.split(part, step):
                piece.copy_(_read(file, entry, first, buffer[: len(piece)])[:, cols])
                first += len(piece)
            return part
        except OSError as error:
            raise ValueError(f"{entry.path}: {name} cannot be read ({error}); download the file again") from error

    def _file(self, entry: TensorEntry, name: str) -> FileIO:
        """The open file, which must still hold what the header said."""
        if entry.path not in self._open_files:
            file = FileIO(entry.path)
            try:
                self._open_files[entry.path] = file, read_header(entry.path)
            except ValueError as error:
                raise ValueError(f"{entry.path}: {name} cannot be read ({error})") from error
        file, header = self._open_files[entry.path]
        if header.get(name) != entry:
            raise ValueError(f"{entry.path}: {name} changed since the checkpoint was opened; start again")
        return file


def _empty(entry: TensorEntry, num_rows: int) -> Tensor:
    return torch.empty(num_rows, *entry.shape[1:], dtype=entry.dtype)


def _read(file: FileIO, entry: TensorEntry, first: int, out: Tensor) -> Tensor:
    """Fill `out`, contiguous, with the tensor's rows from `first` as stored; OSError when the file ends before."""
    row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
    view = memoryview(out.flatten().view(torch.uint8).numpy().data)
    file.seek(entry.data_start + entry.begin + first * row_bytes)
    while view:
        count = file.readinto(view)
        if not count:
            raise OSError(f"the file ends {len(view)} bytes early")
        view = view[count:]
    return out


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Parse and check one file's header; ValueError names the file and the tensor that is wrong.

    The tensors must fill the data part exactly: inside the file, without overlap, without gaps.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or num_bytes > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(
                f"{path} is not a safetensors file, or it is cut short: {_header_problem(size, num_bytes)}"
            )
        raw = file.read(num_bytes)
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: the safetensors header is not valid JSON ({error}); download the file again"
        ) from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the safetensors header is not a JSON object; download the file again")
    header.pop("__metadata__", None)
    data_start = 8 + num_bytes
    entries = {name: _entry_from_header(path, name, value, data_start) for name, value in header.items()}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            kind = "overlaps the tensor before it" if entry.begin < end else "leaves a gap before it"
            raise ValueError(
                f"{path}: {name} {kind} (starts at byte {entry.begin}, expected {end}); download the file again"
            )
        end = entry.end
        if end > size - 8 - num_bytes:
            raise ValueError(
                f"{path} is cut short: {name} ends at byte {end} of the data, the file has {size - 8 - num_bytes}; "
                "download it again"
            )
    if end != size - 8 - num_bytes:
        raise ValueError(f"{path} has {size - 8 - num_bytes - end} bytes after its last tensor; download it again")
    return entries


def _read_shards(index: Path) -> dict[str, TensorEntry]:
    """The tensors that an index file lists, each found in the header of the file that the index names."""
    if index.stat().st_size > MAX_HEADER_BYTES:
        raise ValueError(f"{index} is larger than {MAX_HEADER_BYTES} bytes, which no index is")
    try:
        content = json.loads(index.read_bytes(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{index} is not valid JSON ({error}); download it again") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map from tensor names to files")
    headers: dict[str, dict[str, TensorEntry]] = {}
    entries: dict[str, TensorEntry] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_basename(file):
            raise ValueError(f"{index}: {name} is in {file!r}; files must be plain names in the same directory")
        path = index.parent / file
        if file not in headers:
            if not path.is_file():
                raise ValueError(f"{path} does not exist; {index.name} says it holds {name}")
            headers[file] = read_header(path)
        if name not in headers[file]:
            raise ValueError(f"{path} does not hold {name}, as {index.name} says; are files of two checkpoints mixed?")
        entries[name] = headers[file][name]
    return entries


def _entry_from_header(path: Path, name: str, value: object, data_start: int) -> TensorEntry:
    """One tensor's header entry; its byte count must be what dtype and shape make it."""
    fields = value if isinstance(value, dict) else {}
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    dtype = fields.get("dtype")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{path}: {name} has dtype {dtype!r}, which is not one of {', '.join(_DTYPES)}")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{path}: {name} has shape {shape!r} and data_offsets {offsets!r}; download the file again")
    if offsets[1] - offsets[0] != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise ValueError(
            f"{path}: {name} is {dtype} {shape} but has {offsets[1] - offsets[0]} bytes; download the file again"
        )
    return TensorEntry(
        path=path,
        dtype=_DTYPES[dtype],
        shape=tuple(shape),
        data_start=data_start,
        begin=offsets[0],
        end=offsets[1],
    )


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _hint(model_dir: Path) -> str:
    """What a directory without safetensors files may be."""
    pickled = sorted(path.name for path in model_dir.glob("*") if path.suffix in _PICKLED_SUFFIXES)
    if not pickled:
        return "; is it a model directory?"
    return f"; {_some(pickled)} can hold code and is not read: convert the weights to safetensors"


def _is_basename(file: str) -> bool:
    """Whether `file` names something directly in a directory, on any system, and not the directory or its parent."""
    return file not in ("", ".", "..") and not any(letter in file for letter in "/\\:\0")


def _header_problem(size: int, num_bytes: int) -> str:
    if size < 8:
        return f"{size} bytes in all"
    return f"its header claims {num_bytes} bytes, {min(MAX_HEADER_BYTES, size - 8)} are possible"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _range(name: str, what: str, part: slice | None, shape: tuple[int, ...], dim: int) -> slice | None:
    """`part` as an explicit range of dimension `dim`; None where the tensor has no such dimension."""
    if part is None:
        return slice(0, shape[dim]) if dim < len(shape) else None
    if dim >= len(shape):
        raise ValueError(f"{name} has shape {list(shape)}; it has no {what} to choose from")
    start, stop = 0 if part.start is None else part.start, shape[dim] if part.stop is None else part.stop
    if part.step not in (None, 1) or not 0 <= start <= stop <= shape[dim]:
        raise ValueError(f"{name} has shape {list(shape)}; {what} {start}:{stop} are not a range in it")
    return slice(start, stop)


def _some(items: list[str]) -> str:
    """The first few of a list of names, for an error message."""
    return ", ".join(items[:_NUM_NAMED]) + (", ..." if len(items) > _NUM_NAMED else "")


def _update(update: Callable[[bytes], None], parts: Iterable[bytes]) -> None:
    """Feed `parts` to a hash with their lengths, so that no two lists of parts read the same."""
    for part in parts:
        update(len(part).to_bytes(8, "little"))
        update(part)
