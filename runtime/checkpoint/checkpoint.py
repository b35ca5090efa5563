"""`Checkpoint`: the tensors of a model directory, checked before use and read slice by slice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from shoal.kernels.build import cache_dir
from shoal.kernels.quant import BlockFP8Weight

from .compressed_tensors import Int4Groups, find_int4_matrices
from .file_digests import DigestCache
from .fingerprint import compute_fingerprint
from .fp8_blocks import BLOCK, SCALE_SUFFIX, check_scales, read_block_fp8
from .int4_groups import PACKED_SUFFIX, SUFFIXES, Int4Entry, find_int4, int4_part_names, read_int4
from .model_directory import shorten
from .quantization import find_quantization
from .safetensors_file import TensorEntry
from .shards import find_tensors
from .tensor_reader import TensorReader

_NUM_REMARKS = 3


class Checkpoint:
    """The tensors of a model directory by name. Opening reads headers only; `read` copies one slice of one tensor.

    A directory holds `model.safetensors`, or shards, as a rule with their index `model.safetensors.index.json`. Files
    may be symbolic links to anywhere, as in the cache of Hugging Face: the owner of the directory chose them, not the
    index. Every ValueError names the file, and the tensor where there is one.
    """

    def __init__(self, model_dir: str | Path) -> None:
        self.model_dir = Path(model_dir)
        self._entries, self._remarks = find_tensors(self.model_dir)
        self._reader = TensorReader()

    @property
    def notices(self) -> list[str]:
        """Irregularities that do not matter if `check_names` passes, for the user to know."""
        return list(self._remarks)

    @property
    def names(self) -> list[str]:
        """All stored names, sorted; an int4 matrix has three, none of which is the matrix's own."""
        return sorted(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; of an int4 matrix that of the unpacked one."""
        int4 = self._int4(name)
        return self._entry(name).shape if int4 is None else int4.shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor; int32 for an int4 matrix, which is packed."""
        int4 = self._int4(name)
        return self._entry(name).dtype if int4 is None else int4.packed.dtype

    def read(
        self, name: str, *, rows: slice | None = None, cols: slice | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Copy `tensor[rows, cols]` into new contiguous memory; nothing outside the slice is kept.

        rows, cols   contiguous ranges inside the tensor (cols: for a matrix); None is everything
        dtype        dtype of the result; None keeps the stored one

        An FP8 matrix is returned as weights, W[i, j] * scale_inv[i // 128, j // 128], in bfloat16 unless `dtype` says
        otherwise; the scales come from its `<name>_scale_inv` sibling. An int4 matrix is returned in the dtype of its
        scales unless `dtype` says otherwise, in any case rounded to that dtype first.
        """
        int4 = self._int4(name)
        if int4 is not None:
            return self._read_int4(name, int4, rows, cols, dtype)
        entry = self._entry(name)
        row_range = _range(name, "rows", rows, entry.shape, 0)
        col_range = _range(name, "cols", cols, entry.shape, 1)
        if entry.dtype is not torch.float8_e4m3fn:
            return self._reader.read(entry, row_range, col_range, dtype or entry.dtype)
        scales = self._scales(entry)
        assert row_range is not None
        assert col_range is not None
        # Scales belong to whole blocks: widen the columns to a block boundary and cut them after dequantising.
        first_col = col_range.start // BLOCK * BLOCK
        weight = read_block_fp8(self._reader, entry, scales, row_range, slice(first_col, col_range.stop))
        values = weight.dequantize(dtype or torch.bfloat16)
        return values[:, col_range.start - first_col :].contiguous()

    def read_fp8(self, name: str, *, rows: slice | None = None) -> BlockFP8Weight:
        """Copy rows of an FP8 matrix as they are stored, with their scales; `dtype(name)` says whether it is one."""
        entry = self._entry(name)
        scales = self._scales(entry)
        row_range = _range(name, "rows", rows, entry.shape, 0)
        assert row_range is not None
        return read_block_fp8(self._reader, entry, scales, row_range, slice(0, entry.shape[1]))

    def check_names(self, expected: Mapping[str, tuple[int, ...]], int4: Int4Groups | None = None) -> list[str]:
        """Check that every tensor of `expected` is there with its shape and a usable dtype; reads no weights.

        int4: the matrices that config.json says are int4; None: none are.
        Returns the names that are not in `expected`, for a notice to the user (`mtp_names` are among them). Scales of
        expected quantised matrices are not listed, nor are `rotary_emb.inv_freq` tables, which are computed anew.
        """
        in_int4 = find_int4_matrices(self._entries, expected, int4)
        stored = [name + PACKED_SUFFIX if name in in_int4 else name for name in expected]
        missing = sorted(name for name in stored if name not in self._entries)
        if missing:
            raise ValueError(
                f"{self.model_dir} lacks {len(missing)} of {len(expected)} tensors of the model: "
                f"{shorten(missing)}{self._explain_missing(expected)}"
            )
        wrong = sorted(name for name, shape in expected.items() if self.shape(name) != tuple(shape))
        if wrong:
            described = [f"{name} is {list(self.shape(name))}, expected {list(expected[name])}" for name in wrong]
            raise ValueError(
                f"{self.model_dir}: {len(wrong)} tensors do not have the shape that config.json asks for: "
                f"{shorten(described)}{self._find_quantization()}"
            )
        for name in expected:
            if name in in_int4:
                continue
            entry = self._entries[name]
            if entry.dtype is torch.float8_e4m3fn:
                self._scales(entry)
            elif not entry.dtype.is_floating_point:
                raise ValueError(
                    f"{entry.path}: {name} is stored as {entry.dtype}, expected a float type{self._find_quantization()}"
                )
        return self._unexpected(expected)

    def mtp_names(self, first_layer: int, num_layers: int, tensor_prefix: str = "") -> list[str]:
        """Names of the tensors of `num_layers` multi-token prediction layers, numbered from `first_layer` on.

        They follow the model's own layers, so `first_layer` is num_hidden_layers. tensor_prefix: start of all names.
        """
        prefixes = tuple(f"{tensor_prefix}model.layers.{first_layer + i}." for i in range(num_layers))
        return [name for name in self.names if name.startswith(prefixes)]

    def compute_fingerprint(self) -> str:
        """SHA-256 (hex) that changes with any byte of config.json or of the weight files; see `file_digests` for costs.

        Every process of every layout gets the same. Call it after the last `read`: it raises ValueError if a file
        changed since the checkpoint was opened, so the tensors read are those of the fingerprint.
        """
        return compute_fingerprint(self.model_dir, self._entries, DigestCache(cache_dir()))

    def close(self) -> None:
        """Close the files; tensors already read stay valid."""
        self._reader.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._entries:
            raise ValueError(f"{self.model_dir} has no tensor {name}{_clauses(self._remarks)}")
        return self._entries[name]

    def _scales(self, weight: TensorEntry) -> TensorEntry:
        """The scales of an FP8 matrix, checked."""
        scales = self._entries.get(weight.name + SCALE_SUFFIX)
        try:
            return check_scales(weight, scales)
        except ValueError as error:
            explanation = _clauses(self._remarks) if scales is None else ""
            raise ValueError(f"{error}{explanation}{self._find_quantization()}") from error

    def _int4(self, name: str) -> Int4Entry | None:
        """The int4 matrix of that name, checked; None if the tensor is stored in another way."""
        return None if name in self._entries else find_int4(self._entries, name)

    def _read_int4(
        self, name: str, entry: Int4Entry, rows: slice | None, cols: slice | None, dtype: torch.dtype | None
    ) -> Tensor:
        row_range = _range(name, "rows", rows, entry.shape, 0)
        col_range = _range(name, "cols", cols, entry.shape, 1)
        assert row_range is not None
        assert col_range is not None
        return read_int4(self._reader, entry, row_range, col_range).to(dtype or entry.scales.dtype)

    def _find_quantization(self) -> str:
        """A quantisation that the tensors show and that cannot be read, as a clause of an error message."""
        return find_quantization(self._entries.keys() - int4_part_names(self._entries))

    def _unexpected(self, expected: Mapping[str, tuple[int, ...]]) -> list[str]:
        known = set(expected) | {name + SCALE_SUFFIX for name in expected}
        known |= {name + suffix for name in expected if name not in self._entries for suffix in SUFFIXES}
        return [name for name in self.names if name not in known and not name.endswith("rotary_emb.inv_freq")]

    def _explain_missing(self, expected: Mapping[str, tuple[int, ...]]) -> str:
        """Possible reasons for missing tensors, as clauses of an error message."""
        explanation = _clauses(self._remarks) + self._find_quantization()
        others = self._unexpected(expected)
        if others and not explanation:
            return f"; it has others that the model has not: {shorten(others)}"
        return explanation


def _clauses(remarks: list[str]) -> str:
    """The first remarks as further clauses of an error message."""
    more = f"; and {len(remarks) - _NUM_REMARKS} more" if len(remarks) > _NUM_REMARKS else ""
    return "".join(f"; {remark}" for remark in remarks[:_NUM_REMARKS]) + more


def _range(name: str, what: str, part: slice | None, shape: tuple[int, ...], dim: int) -> slice | None:
    """`part` as an explicit range of dimension `dim`; None where the tensor has no such dimension."""
    if part is None:
        return slice(0, shape[dim]) if dim < len(shape) else None
    if dim >= len(shape):
        raise ValueError(f"{name} has shape {list(shape)}; it has no {what} to choose from")
    start = 0 if part.start is None else part.start
    stop = shape[dim] if part.stop is None else part.stop
    if part.step not in (None, 1) or not 0 <= start <= stop <= shape[dim]:
        raise ValueError(f"{name} has shape {list(shape)}; {what} {start}:{stop} are not a range in it")
    return slice(start, stop)
