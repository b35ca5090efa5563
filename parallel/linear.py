"""Exact tensor-parallel matmuls: the output dimension is split and gathered, the reduction never is."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.kernels.linear import PackedWeight
from shoal.kernels.math_utils import cdiv
from shoal.kernels.ops import Ops

from .collectives import Communicator


def shard(size: int, rank: int, num_ranks: int) -> slice:
    """Half-open range of the `size` outputs that `rank` computes; `size` is a multiple of `num_ranks`."""
    assert size % num_ranks == 0, f"{size} outputs over {num_ranks} ranks"
    width = size // num_ranks
    return slice(rank * width, (rank + 1) * width)


def gather_last_dim(x: Tensor, comm: Communicator, *, layer: int, op: str) -> Tensor:
    """[.., n] on every rank -> [.., size * n]: the columns of all ranks side by side, in rank order."""
    return x if comm.size == 1 else comm.all_gather(x, dim=-1, layer=layer, op=op)


def column_parallel(ops: Ops, x: Tensor, weight: PackedWeight, comm: Communicator, *, layer: int, op: str) -> Tensor:
    """x [T, K] times this rank's rows of the weight, gathered: [T, N], the same bits for every number of ranks."""
    return gather_last_dim(ops.linear(x, weight), comm, layer=layer, op=op)


def split_tokens(x: Tensor, comm: Communicator) -> Tensor:
    """This rank's share of tokens that every rank of the group holds: [T, ..] -> [<= ceil(T / size), ..]."""
    share = cdiv(x.shape[0], comm.size)
    return x[comm.rank * share : (comm.rank + 1) * share]


def gather_tokens(x: Tensor, num_tokens: int, comm: Communicator, *, layer: int, op: str) -> Tensor:
    """The inverse of `split_tokens`: every rank's share -> [num_tokens, ..] on all of them.

    rank 0: t0 t1 | rank 1: t2 t3 | rank 2: t4 --   (the last shares are padded to equal length)
    all:    t0 t1 t2 t3 t4
    """
    if comm.size == 1:
        return x
    share = cdiv(num_tokens, comm.size)
    if x.shape[0] < share:
        x = torch.cat([x, x.new_zeros(share - x.shape[0], *x.shape[1:])])
    return comm.all_gather(x, dim=0, layer=layer, op=op)[:num_tokens]
