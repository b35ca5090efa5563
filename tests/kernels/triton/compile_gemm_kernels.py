"""Compiles the kernels of products and rows; fails if one is missing here or needs too much memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from shoal.kernels.triton import dispatch, experts, index_keys, linear, norm, quant, rope, sampling
from shoal.kernels.triton import topk_router as router
from shoal.kernels.triton.gemm import BF16, DECODED_FP8, FP32, NATIVE_FP8
from shoal.kernels.triton.gemm_config import TILES, GemmConfig
from tests.kernels.triton.compiler import SHARED_BYTES, Case, compile_cases, compile_modules

MODULES = (norm, quant, rope, linear, experts, index_keys, router, sampling, dispatch)
TRITON_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8e4nv", torch.uint8: "u8"}
KINDS = {torch.float32: FP32, torch.bfloat16: BF16, torch.float8_e4m3fn: NATIVE_FP8, torch.uint8: DECODED_FP8}


def row_kernels() -> Iterator[Case]:
    norm_types = {"x": "*bf16", "weight": "*fp32", "y": "*bf16", "stride_x": "i32!", "dim": "i32!", "eps": "fp32"}
    block, wide = {"BLOCK": 8192}, {"num_warps": 8}
    yield norm._rms_norm_kernel, norm_types, block, wide
    yield norm._layer_norm_kernel, {**norm_types, "bias": "*fp32"}, block, wide
    add_types = {**norm_types, "residual": "*bf16", "normed": "*bf16", "total": "*bf16", "stride_r": "i32!"}
    del add_types["y"]
    yield norm._add_rms_norm_kernel, add_types, block, wide

    rope_types = {"x": "*bf16", "table": "*fp32", "positions": "*i64", "y": "*bf16", "stride_t": "i32!"}
    rope_types |= {"stride_h": "i32!", "num_heads": "i32!", "num_positions": "i32!"}
    for interleaved in (True, False):
        constants = {"HEADS": 128, "HALF": 32, "INTERLEAVED": interleaved}
        yield rope._rope_kernel, rope_types, constants, {"num_warps": 8}
    entry_types = {"latent": "*bf16", "rope_key": "*bf16", "table": "*fp32", "positions": "*i64", "slots": "*i64"}
    entry_types |= dict.fromkeys(("stride_l", "stride_r", "stride_s", "num_positions", "num_tokens"), "i32!")
    yield (
        rope._write_latents_kernel,
        {**entry_types, "kv_cache": "*bf16", "latent_dim": "i32!"},
        {"TOKENS": 4, "LATENT": 512, "HALF": 32, "INTERLEAVED": True},
        {},
    )

    yield index_key_case("*bf16", fp8=False, native=False)

    yield (
        router._route_kernel,
        {"logits": "*fp32", "bias": "*fp32", "topk_idx": "*i64", "topk_weights": "*fp32", "scale": "fp32"}
        | dict.fromkeys(("num_experts", "num_groups", "group_size", "topk_group"), "i32"),
        {"GROUPS": 8, "GROUP_SIZE": 32, "TOP_K": 8, "TOP_K_BLOCK": 8, "NORMALIZE": True},
        {"num_warps": 1},
    )
    pair_types = {"topk_idx": "*i64", "slot_of": "*i64", "chunk_counts": "*i32", "num_pairs": "i32", "num_slots": "i32"}
    pair_blocks = {"CHUNK": dispatch.CHUNK, "SLOTS": 512}
    yield dispatch._count_kernel, pair_types, pair_blocks, {}
    pair_types = pair_types | dict.fromkeys(("token_of", "row_of", "counts"), "*i64")
    pair_types = pair_types | {"num_chunks": "i32", "top_k": "i32"}
    yield dispatch._place_kernel, pair_types, pair_blocks, {}
    rank_types = {
        "topk_idx": "*i64",
        "rank_of": "*i64",
        "chunk_counts": "*i32",
        "num_tokens": "i32",
        "num_ranks": "i32",
    }
    rank_blocks = {"TOP_K": 8, "TOKENS": 16, "SLOTS": 8, "RANKS": 32}
    yield dispatch._count_ranks_kernel, rank_types, rank_blocks, {}
    rank_types = rank_types | dict.fromkeys(("slot_of", "row_of", "row_places"), "*i64")
    rank_types = rank_types | {"totals": "*i32", "integers": "*i32", "num_chunks": "i32", "row_bytes": "i32!"}
    yield dispatch._route_kernel, rank_types, rank_blocks, {}
    copy_types = {"x": "*bf16", "row_places": "*i64", "send_buffers": "*bf16", "stride": "i32!", "width": "i32!"}
    yield dispatch._copy_rows_kernel, copy_types, {"TOP_K": 8, "BLOCK": 1024}, {}
    sampling_types = {"logits": "*fp32", "highest": "*fp32", "stride": "i32!", "vocab_size": "i32!"}
    yield sampling._highest_kernel, {**sampling_types, "tokens": "*i64"}, {"BLOCK": 4096}, {"num_warps": 8}
    sampling_types = sampling_types | {"temperatures": "*fp32", "sums": "*fp64", "num_chunks": "i32"}
    yield sampling._chunk_sums_kernel, sampling_types, {"CHUNK": sampling.CHUNK}, {}
    sampling_types = sampling_types | dict.fromkeys(("seeds", "positions", "sample_indices", "tokens"), "*i64")
    yield sampling._draw_kernel, sampling_types, {"CHUNK": sampling.CHUNK, "CHUNKS": 128}, {}
    limits = {"logits": "*fp32", "out": "*fp32", "highest": "*fp32", "temperatures": "*fp32", "top_k": "*i64"}
    limits |= {"top_p": "*fp32", "min_p": "*fp32", "stride": "i32!", "vocab_size": "i32!"}
    mask_types = {"logits": "*fp32", "bitmask": "*i32", "out": "*fp32", "stride": "i32!", "mask_stride": "i32"}
    yield sampling._mask_kernel, mask_types | {"vocab_size": "i32!"}, {"BLOCK": sampling.CHUNK}, {"num_warps": 4}
    yield sampling._truncate_kernel, limits, {"BLOCK": 8192}, {"num_warps": 16}
    logprob_types = {"logits": "*fp32", "token_ids": "*i64", "highest": "*fp32", "sums": "*fp64", "earlier": "*i32"}
    logprob_types |= {"stride": "i32!", "num_chunks": "i32", "num_tokens": "i32"}
    parts_types = logprob_types | {"vocab_size": "i32!"}
    yield sampling._logprob_parts_kernel, parts_types, {"CHUNK": sampling.CHUNK}, {}
    logprob_types |= {"logprobs": "*fp32", "ranks": "*i64"}
    yield sampling._logprob_kernel, logprob_types, {"CHUNKS": 128, "TOKENS": 32}, {}
    yield (
        experts._swiglu_kernel,
        {"gate_up": "*bf16", "y": "*bf16", "stride": "i32!", "width": "i32!"},
        {"BLOCK": 1024},
        {},
    )
    table_types = {"counts": "*i64", "table": "*i32", "num_experts": "i32"}
    yield experts._tile_table_kernel, table_types, {"EXPERTS": 8, "BLOCK_M": 128}, {"num_warps": 1}
    sum_types = {"chunks": "*fp32", "y": "*bf16", "num_chunks": "i32", "M": "i32"}
    sum_types |= dict.fromkeys(("N", "stride_ys", "stride_yb", "stride_ym"), "i32!")
    yield linear._sum_chunks_kernel, sum_types, {"BLOCK": 256}, {"num_warps": 2}
    combine_types = {"y": "*bf16", "row_of": "*i64", "weights": "*fp32", "shared": "*bf16", "out": "*bf16"}
    combine_types |= {"stride_y": "i32!", "hidden": "i32!"}
    yield experts._combine_kernel, combine_types, {"TOP_K": 8, "HAS_SHARED": True, "BLOCK": 1024}, {}


def index_key_case(stored: str, *, fp8: bool, native: bool) -> Case:
    types = {"k": "*bf16", "weight": "*fp32", "bias": "*fp32", "table": "*fp32", "positions": "*i64", "slots": "*i64"}
    types |= {"scales": "*fp32", "dim": "i32!", "block_size": "i32!", "eps": "fp32"}
    types |= {"keys": "*u8" if fp8 else stored, "codes": stored}
    types |= dict.fromkeys(("stride_k", "num_positions", "num_tokens"), "i32!")
    constants = {"TOKENS": index_keys.TOKENS_PER_PROGRAM, "DIM": 128, "HALF": 32, "INTERLEAVED": False}
    return index_keys._write_index_keys_kernel, types, constants | {"FP8": fp8, "NATIVE": native}, {}


def fp8_row_kernels(native: bool) -> Iterator[Case]:
    codes = "*fp8e4nv" if native else "*u8"
    quant_types = {"x": "*bf16", "q": codes, "scales": "*fp32", "stride_x": "i32!", "stride_s": "i32", "dim": "i32!"}
    for ue8m0 in (True, False):
        constants = {"GROUPS": quant.GROUPS_PER_PROGRAM, "UE8M0": ue8m0, "NATIVE": native}
        yield quant._quantize_kernel, quant_types, constants, {}
    types = {"latent": "*bf16", "rope_key": "*bf16", "table": "*fp32", "positions": "*i64", "slots": "*i64"}
    types |= {"codes": codes, "scales": "*fp32", "rope_keys": "*bf16", "num_groups": "i32"}
    types |= dict.fromkeys(("stride_l", "stride_r", "stride_s", "num_positions", "num_tokens"), "i32!")
    constants = {"TOKENS": 4, "GROUPS": 4, "HALF": 32, "INTERLEAVED": True, "NATIVE": native}
    yield rope._write_fp8_latents_kernel, types, constants, {}
    yield index_key_case(codes, fp8=True, native=native)


def product_kernels(dtype: torch.dtype, tiles: GemmConfig, target: int) -> Iterator[Case]:
    kind = KINDS[dtype]
    types, constants = product(tiles, TRITON_TYPES[dtype], kind.value)
    linear_types = types | dict.fromkeys(("M", "stride_ys", "stride_yb", "stride_ym"), "i32!")
    constants |= {"PAIRED": tiles.paired, "ROW_SCALES": tiles == TILES[dtype][-1]}

    def with_stages(*, gated: bool) -> tuple[dict[str, Any], dict[str, int]]:
        stages = tiles.stages(dtype.itemsize, SHARED_BYTES[target], gated=gated)
        options = {"num_warps": tiles.num_warps, "num_stages": stages}
        options |= {} if tiles.maxnreg is None else {"maxnreg": tiles.maxnreg}
        return constants | {"NUM_STAGES": stages}, options

    sized, options = with_stages(gated=False)
    yield linear._linear_kernel, linear_types, sized | {"SPLIT": dtype == torch.float32}, options
    expert_types = types | {"table": "*i32", "num_tiles": "i32", "stride_y": "i32!", "stride_ws": "i32"}
    gated = tiles == TILES[dtype][0]
    sized, options = with_stages(gated=gated)
    yield experts._experts_kernel, expert_types, sized | {"GATED": gated}, options


def product(tiles: GemmConfig, dtype: str, kind: int) -> tuple[dict[str, str], dict[str, Any]]:
    types = {
        "x_desc": f"tensordesc<{dtype}[1, {tiles.block_m}, {tiles.block_k}]>",
        "w_desc": f"tensordesc<{dtype}[1, {tiles.block_n}, {tiles.block_k}]>",
        "y": "*bf16",
        "N": "i32!",
        "K": "i32!",
        "stride_xs": "i32!",
    }
    constants: dict[str, Any] = {"GROUP_M": 8, "KIND": kind}
    constants |= {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k}
    if kind >= NATIVE_FP8.value:
        types |= {"x_scale": "*fp32", "w_scale": "*fp32"}
    else:
        constants |= {"x_scale": None, "w_scale": None}
    return types, constants


def compile_all(target: int) -> set[str]:
    native = target >= 89
    cases = [*row_kernels(), *fp8_row_kernels(native)]
    for dtype in TRITON_TYPES:
        if dtype != (torch.uint8 if native else torch.float8_e4m3fn):
            for tiles in {TILES[dtype][0], TILES[dtype][-1]}:
                cases += product_kernels(dtype, tiles, target)
    return compile_cases(cases, target)


if __name__ == "__main__":
    compile_modules(MODULES, compile_all)
