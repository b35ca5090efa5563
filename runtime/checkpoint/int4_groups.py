"""int4 matrices with one scale per group of columns of a row, as compressed-tensors packs them (pack-quantized).

<name>_packed   int32 [rows, cols / 8]               values of 8 columns, stored as value + 8, the first in the low bits
<name>_scale    bfloat16 or float32 [rows, cols / group size]
<name>_shape    int32 or int64 [2]                   rows and cols
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.math_utils import cdiv

from .safetensors_file import TensorEntry
from .tensor_reader import TensorReader

PACKED_SUFFIX = "_packed"
SCALE_SUFFIX = "_scale"
SHAPE_SUFFIX = "_shape"
SUFFIXES = (PACKED_SUFFIX, SCALE_SUFFIX, SHAPE_SUFFIX)
VALUES_PER_INT32 = 8

_ZERO = 8
"""What is stored for a weight of 0."""
_OTHER_FORMS = {
    "_zero_point": "zero points (asymmetric quantisation)",
    "_g_idx": "a group for each column (actorder group)",
}
"""Suffixes of tensors that other int4 forms of compressed-tensors have in addition."""


@dataclass(frozen=True, slots=True)
class Int4Entry:
    """Location of an int4 matrix."""

    packed: TensorEntry
    scales: TensorEntry
    stored_shape: TensorEntry

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, cols] of the unpacked matrix."""
        rows, words = self.packed.shape
        return rows, words * VALUES_PER_INT32

    @property
    def group_size(self) -> int:
        """Number of columns that share a scale."""
        return self.shape[1] // self.scales.shape[1]


def find_int4(entries: Mapping[str, TensorEntry], name: str) -> Int4Entry | None:
    """The int4 matrix `name`, None if there is none; ValueError when its tensors do not belong together."""
    packed = entries.get(name + PACKED_SUFFIX)
    if packed is None:
        return None
    if packed.dtype is not torch.int32 or len(packed.shape) != 2:
        raise ValueError(
            f"{packed.path}: {packed.name} is {packed.dtype} {list(packed.shape)}, expected an int32 matrix"
        )
    for suffix, form in _OTHER_FORMS.items():
        if name + suffix in entries:
            raise ValueError(f"{packed.path}: {name} has {form} in {name + suffix}, which is not supported")
    scales, stored_shape = (_part(entries, packed, name + suffix) for suffix in (SCALE_SUFFIX, SHAPE_SUFFIX))
    entry = Int4Entry(packed, scales, stored_shape)
    rows, cols = entry.shape
    num_groups = scales.shape[1] if len(scales.shape) == 2 else 0
    splits = num_groups > 0 and cols % num_groups == 0 and cols // num_groups % VALUES_PER_INT32 == 0
    if not splits or scales.shape[0] != rows or scales.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(
            f"{scales.path}: {scales.name} is {scales.dtype} {list(scales.shape)}, expected bfloat16 or float32 "
            f"[{rows}, groups] with groups of equal size, a multiple of {VALUES_PER_INT32}, for {name} {[rows, cols]}"
        )
    if stored_shape.dtype not in (torch.int32, torch.int64) or stored_shape.shape != (2,):
        raise ValueError(
            f"{stored_shape.path}: {stored_shape.name} is {stored_shape.dtype} {list(stored_shape.shape)}, expected "
            f"int32 or int64 [2]"
        )
    return entry


def int4_part_names(entries: Mapping[str, TensorEntry]) -> set[str]:
    """Names of the tensors of all int4 matrices, also of those of which some are missing."""
    return {
        name.removesuffix(suffix) + part
        for name, entry in entries.items()
        for suffix in (PACKED_SUFFIX, SHAPE_SUFFIX)
        if name.endswith(suffix) and entry.dtype in (torch.int32, torch.int64)
        for part in SUFFIXES
    }


def read_int4(reader: TensorReader, entry: Int4Entry, rows: slice, cols: slice) -> Tensor:
    """Copy `matrix[rows, cols]`, unpacked, in the dtype of its scales. ValueError when the stored shape is another."""
    stored = reader.read(entry.stored_shape, None, None, torch.int64).tolist()
    if stored != list(entry.shape):
        raise ValueError(
            f"{entry.stored_shape.path}: {entry.stored_shape.name} says {stored}, but {entry.packed.name} holds "
            f"{list(entry.shape)}; download the file again"
        )
    # Scales belong to whole groups: widen the columns to group boundaries and cut them after unpacking.
    size = entry.group_size
    groups = slice(cols.start // size, cdiv(cols.stop, size))
    first_col = groups.start * size
    words = slice(first_col // VALUES_PER_INT32, groups.stop * size // VALUES_PER_INT32)
    packed = reader.read(entry.packed, rows, words, torch.int32)
    scales = reader.read(entry.scales, rows, groups, entry.scales.dtype)
    return unpack_int4(packed, scales, size)[:, cols.start - first_col : cols.stop - first_col].contiguous()


def unpack_int4(packed: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """The matrix in the dtype of its scales, in which compressed-tensors multiplies too.

    packed: int32 [rows, cols / 8]. scales: [rows, groups]. A bfloat16 scale times 4 bits is exact in float32, in which
    torch multiplies bfloat16, and is rounded once.
    """
    pairs = packed.view(torch.uint8)  # little endian: the first of a pair of columns is in the low bits
    stored = torch.stack((pairs & 0xF, pairs >> 4), dim=-1)
    values = stored.view(*scales.shape, group_size).to(scales.dtype).sub_(_ZERO)
    return values.mul_(scales.unsqueeze(-1)).flatten(1)


def quantize_int4(values: Tensor, group_size: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(packed, scales) of a matrix: a group's largest magnitude becomes 7 or -7.

    values: [rows, cols], float32; cols is a multiple of `group_size`.
    """
    rows, cols = values.shape
    groups = values.view(rows, cols // group_size, group_size)
    scales = (groups.abs().amax(dim=-1) / 7).to(scale_dtype)
    stored = (groups / scales.float().unsqueeze(-1)).round().clamp(-_ZERO, _ZERO - 1).add(_ZERO).to(torch.uint8)
    low, high = stored.view(rows, cols // 2, 2).unbind(-1)
    return (low | high << 4).view(torch.int32), scales


def _part(entries: Mapping[str, TensorEntry], packed: TensorEntry, name: str) -> TensorEntry:
    if name not in entries:
        raise ValueError(f"{packed.path}: {packed.name} needs {name}, which is not in the checkpoint")
    return entries[name]
