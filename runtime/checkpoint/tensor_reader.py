"""Copies slices of tensors out of safetensors files.

Files are read, not mapped: pages of a mapped file count as this process's memory until the file is closed, and a file
that shrinks while it is mapped ends the process.
"""

from __future__ import annotations

import math
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from .safetensors_file import FileVersion, TensorEntry

_PIECE_BYTES = 16 << 20
"""Size of the buffer through which a matrix is read whose columns are sliced."""


class TensorReader:
    """The open files of a checkpoint. Not for use by several threads at once."""

    def __init__(self) -> None:
        self._files: dict[Path, FileIO] = {}

    def read(self, entry: TensorEntry, rows: slice | None, cols: slice | None, dtype: torch.dtype) -> Tensor:
        """Copy `tensor[rows, cols]` into new contiguous memory, converted to `dtype` on the way.

        rows, cols   ranges with start and stop inside the tensor; None is everything

        Of a matrix whose columns are sliced, at most `_PIECE_BYTES` are in memory besides the result. A ValueError
        names the file and the tensor when the file has changed or cannot be read.
        """
        try:
            file = self._open(entry)
            if not entry.shape:
                return _read_rows(file, entry, 0, torch.empty(1, dtype=entry.dtype)).view(()).to(dtype)
            rows = rows or slice(0, entry.shape[0])
            if cols is None or cols == slice(0, entry.shape[1]):
                return _read_rows(file, entry, rows.start, _empty_rows(entry, rows.stop - rows.start)).to(dtype)
            return _read_columns(file, entry, rows, cols, dtype)
        except OSError as error:
            raise ValueError(f"{entry.path}: {entry.name} cannot be read ({error}); download the file again") from error

    def close(self) -> None:
        """Close the files; tensors already read stay valid."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _open(self, entry: TensorEntry) -> FileIO:
        """The open file of a tensor, which must be unchanged since its header was read."""
        if entry.path not in self._files:
            self._files[entry.path] = FileIO(entry.path)
        file = self._files[entry.path]
        if FileVersion.of(file.fileno()) != entry.file.version:
            raise ValueError(f"{entry.path}: {entry.name} changed since the checkpoint was opened; start again")
        return file


def _read_columns(file: FileIO, entry: TensorEntry, rows: slice, cols: slice, dtype: torch.dtype) -> Tensor:
    num_rows = rows.stop - rows.start
    out = torch.empty(num_rows, cols.stop - cols.start, dtype=dtype)
    piece_rows = max(1, _PIECE_BYTES // (entry.shape[1] * entry.dtype.itemsize))
    buffer = _empty_rows(entry, min(piece_rows, num_rows))  # reused: a freed one leaves holes in the heap
    first_row = rows.start
    for piece in torch.split(out, piece_rows):
        piece.copy_(_read_rows(file, entry, first_row, buffer[: len(piece)])[:, cols])
        first_row += len(piece)
    return out


def _read_rows(file: FileIO, entry: TensorEntry, first_row: int, out: Tensor) -> Tensor:
    """Fill `out`, contiguous, with the stored rows from `first_row` on; OSError when the file ends before."""
    row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
    view = memoryview(out.flatten().view(torch.uint8).numpy().data)
    file.seek(entry.file.data_start + entry.begin + first_row * row_bytes)
    while view:
        count = file.readinto(view)
        if not count:
            raise OSError(f"the file ends {len(view)} bytes early")
        view = view[count:]
    return out


def _empty_rows(entry: TensorEntry, num_rows: int) -> Tensor:
    return torch.empty(num_rows, *entry.shape[1:], dtype=entry.dtype)
