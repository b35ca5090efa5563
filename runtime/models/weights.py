"""Weights of a model: declared when a layer is built, filled by `load`, and filled in place when loaded again.

A declaration names the tensors of the checkpoint, their shapes, the part of them that this rank stores and how that
part is packed. Nothing is read or allocated before `load`, so names, shapes and memory are known without any file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from shoal.kernels.backends import Backend
from shoal.kernels.linear import PackedWeight, packed_num_bytes
from shoal.kernels.ops import Ops
from shoal.kernels.quant import BLOCK, BlockFP8Weight

Shape = tuple[int, ...]
IsFP8 = Callable[[str], bool]
"""Whether the tensor of that name is stored as FP8 with block scales."""


class WeightSource(Protocol):
    """Named tensors that can be read slice by slice, such as a `Checkpoint`."""

    def dtype(self, name: str) -> torch.dtype:
        """Dtype as stored."""
        ...

    def read(
        self, name: str, *, rows: slice | None = None, cols: slice | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """`tensor[rows, cols]` in `dtype`, contiguous, in host memory of its own; quantised values are dequantised."""
        ...

    def read_fp8(self, name: str, *, rows: slice | None = None) -> BlockFP8Weight:
        """Rows of an FP8 matrix with their scales."""
        ...


class Weight(ABC):
    """One or more tensors of the checkpoint in the form in which this rank stores them."""

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, Shape]:
        """Name and whole shape of every tensor of the checkpoint that this weight is made of."""

    @abstractmethod
    def load(self, source: WeightSource) -> None:
        """Read and pack this rank's part; a weight that was loaded before keeps its memory."""

    @abstractmethod
    def num_bytes(self, backend: Backend, is_fp8: IsFP8) -> int:
        """Bytes on the device once loaded for the kernels of `backend`."""


class Layer:
    """A part of a model; its weights are the attributes of type `Weight`, also those of layers inside it."""

    def named_weights(self) -> Iterator[tuple[str, Weight]]:
        """(path of attributes such as "layers.3.attention.o_proj", weight), in the order of declaration."""
        for name, value in vars(self).items():
            if isinstance(value, Weight):
                yield name, value
            elif isinstance(value, Layer):
                yield from ((f"{name}.{path}", weight) for path, weight in value.named_weights())
            elif isinstance(value, list):
                for index, item in enumerate(value):
                    if isinstance(item, Layer):
                        yield from ((f"{name}.{index}.{path}", weight) for path, weight in item.named_weights())

    def load(self, source: WeightSource) -> None:
        """Load every weight, one at a time."""
        for value in vars(self).values():
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, Weight | Layer):
                    item.load(source)


@dataclass(frozen=True, slots=True)
class WeightFactory:
    """Declares the weights of one module: names relative to `prefix`, stored for the kernels of `ops` on `device`."""

    prefix: str
    ops: Ops
    dtype: torch.dtype
    """Compute dtype: weights are rounded to it unless a declaration says otherwise."""
    device: torch.device
    ue8m0: bool = False
    """Whether inputs of FP8 GEMMs are quantised with power-of-two scales, as the checkpoint was trained."""

    def under(self, name: str) -> WeightFactory:
        """The factory of a submodule."""
        return replace(self, prefix=self._path(name))

    def vector(self, name: str, size: int, *, dtype: torch.dtype | None = None) -> TensorWeight:
        """[size] float32 on the device, its values rounded to `dtype` (the compute dtype unless given)."""
        return TensorWeight(self._path(name), (size,), dtype or self.dtype, torch.float32, self.device)

    def table(self, name: str, shape: tuple[int, int], *, cols: slice) -> TensorWeight:
        """Columns of a matrix that rows are looked up in, in the compute dtype."""
        return TensorWeight(self._path(name), shape, self.dtype, self.dtype, self.device, cols)

    def matrix(
        self,
        tensors: Mapping[str, tuple[int, int]],
        *,
        rows: slice | None = None,
        dtype: torch.dtype | None = None,
        keep_fp8: bool = True,
    ) -> MatrixWeight:
        """The given rows of each matrix [N, K], stacked along N and packed for GEMMs.

        Matrices that are all stored as FP8 stay in 8 bits unless `keep_fp8` is off or `dtype` is given.
        """
        paths = {self._path(name): shape for name, shape in tensors.items()}
        return MatrixWeight(self, paths, rows, dtype or self.dtype, keep_fp8=keep_fp8 and dtype is None)

    def experts(
        self, tensors: Mapping[str, tuple[int, int]], *, num_experts: int, local: Sequence[int]
    ) -> ExpertWeights:
        """For each local expert slot, the matrices [N, K] of its expert stacked along N and packed for grouped GEMMs.

        tensors: names relative to an expert. local: the logical expert in each slot of this rank.
        """
        return ExpertWeights(self, tensors, num_experts, local)

    def _path(self, name: str) -> str:
        return f"{self.prefix}.{name}" if self.prefix else name


class TensorWeight(Weight):
    """A tensor that is used as it is."""

    data: Tensor
    """Exists once loaded."""

    def __init__(
        self,
        name: str,
        shape: Shape,
        rounded_to: torch.dtype,
        dtype: torch.dtype,
        device: torch.device,
        cols: slice | None = None,
    ) -> None:
        """Values are rounded to `rounded_to` and stored in `dtype`, which can hold them exactly."""
        self.dtype = dtype
        self._name = name
        self._shape = shape
        self._rounded_to = rounded_to
        self._device = device
        self._cols = cols

    @property
    def tensors(self) -> Mapping[str, Shape]:
        return {self._name: self._shape}

    def load(self, source: WeightSource) -> None:
        values = source.read(self._name, cols=self._cols, dtype=self._rounded_to).to(self._device).to(self.dtype)
        if hasattr(self, "data"):
            self.data.copy_(values)
        else:
            self.data = values

    def num_bytes(self, backend: Backend, is_fp8: IsFP8) -> int:
        rows, *columns = self._shape
        width = columns[0] if columns else 1
        return rows * (width if self._cols is None else _length(self._cols, width)) * self.dtype.itemsize


class MatrixWeight(Weight):
    """Matrices that multiply the same input, one over the other, packed for GEMMs."""

    data: PackedWeight
    """[N, K]; exists once loaded."""

    def __init__(
        self,
        factory: WeightFactory,
        tensors: Mapping[str, tuple[int, int]],
        rows: slice | None,
        dtype: torch.dtype,
        *,
        keep_fp8: bool,
    ) -> None:
        self.dtype = dtype
        self._tensors = tensors
        self._factory = factory
        self._rows = rows
        self._keep_fp8 = keep_fp8

    @property
    def tensors(self) -> Mapping[str, Shape]:
        return self._tensors

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of this rank's part."""
        shapes = list(self._tensors.values())
        return sum(_length(self._rows, rows) for rows, _ in shapes), shapes[0][1]

    def load(self, source: WeightSource) -> None:
        packed = self.pack(source)
        if hasattr(self, "data"):
            store(packed, self.data)
        else:
            self.data = packed

    def pack(self, source: WeightSource) -> PackedWeight:
        """A packed copy, in memory of its own."""
        ops, device = self._factory.ops, self._factory.device
        if self._stays_fp8(lambda name: source.dtype(name) is torch.float8_e4m3fn):
            stored = [source.read_fp8(name, rows=self._rows) for name in self.tensors]
            return ops.pack_weight(BlockFP8Weight.cat(stored).to(device), dtype=self.dtype, ue8m0=self._factory.ue8m0)
        parts = [source.read(name, rows=self._rows, dtype=self.dtype).to(device) for name in self.tensors]
        return ops.pack_weight(parts[0] if len(parts) == 1 else torch.cat(parts))

    def num_bytes(self, backend: Backend, is_fp8: IsFP8) -> int:
        lengths = [_length(self._rows, rows) for rows, _ in self._tensors.values()]
        starts_at_block = self._rows is None or self._rows.start % BLOCK == 0
        return packed_num_bytes(
            self.shape,
            self.dtype,
            backend,
            fp8=self._stays_fp8(is_fp8),
            row_scales=not starts_at_block or any(length % BLOCK for length in lengths[:-1]),
        )

    def _stays_fp8(self, is_fp8: IsFP8) -> bool:
        return self._keep_fp8 and all(is_fp8(name) for name in self.tensors)


class ExpertWeights(Weight):
    """The same matrix of every local expert, in the order of the slots."""

    data: PackedWeight
    """[num_slots, N, K]; exists once loaded."""

    def __init__(
        self,
        factory: WeightFactory,
        tensors: Mapping[str, tuple[int, int]],
        num_experts: int,
        local: Sequence[int],
    ) -> None:
        """tensors: names relative to an expert. local: the logical expert in each slot of this rank."""
        self._factory = factory
        self._tensors_of_expert = tensors
        self._num_experts = num_experts
        self._local = [self._expert(expert) for expert in local]

    @property
    def tensors(self) -> Mapping[str, Shape]:
        """Those of all experts: a checkpoint has them, whichever of them this rank stores."""
        experts = map(self._expert, range(self._num_experts))
        return {name: shape for expert in experts for name, shape in expert.tensors.items()}

    def _expert(self, expert: int) -> MatrixWeight:
        return self._factory.under(f"experts.{expert}").matrix(self._tensors_of_expert)

    def load(self, source: WeightSource) -> None:
        packed = (expert.pack(source) for expert in self._local)  # one exists at a time
        if hasattr(self, "data"):
            for slot, weight in enumerate(packed):
                store(weight, self.data, slot)
        else:
            shape = self._expert(0).shape
            self.data = self._factory.ops.pack_each(packed, len(self._local), shape, self._factory.dtype)

    def num_bytes(self, backend: Backend, is_fp8: IsFP8) -> int:
        return sum(expert.num_bytes(backend, is_fp8) for expert in self._local)


def store(new: PackedWeight, into: PackedWeight, slot: int = 0) -> None:
    """Copy a packed matrix over one of `into`; ValueError if that is stored in another format."""
    if (new.format, new.data.shape[1:], new.has_row_scales) != (into.format, into.data.shape[1:], into.has_row_scales):
        raise ValueError(
            f"a weight of shape {[into.out_features, into.in_features]} was loaded "
            f"{'in FP8' if into.is_fp8 else 'unquantised'} and cannot be replaced by one of shape "
            f"{[new.out_features, new.in_features]} that is {'in FP8' if new.is_fp8 else 'unquantised'}"
        )
    into.data[slot].copy_(new.data[0])
    if into.scale_inv is not None and new.scale_inv is not None:
        into.scale_inv[slot].copy_(new.scale_inv[0])


def tensor_shapes(named_weights: Iterable[tuple[str, Weight]]) -> dict[str, Shape]:
    """Name and shape of every tensor of a checkpoint that these weights are loaded from."""
    return {name: shape for _, weight in named_weights for name, shape in weight.tensors.items()}


def _length(part: slice | None, size: int) -> int:
    return size if part is None else int(part.stop) - int(part.start)
