"""Compiles the kernels of attention and the indexer; fails if one is missing here or needs too much memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from shoal.kernels.triton import attention, indexer, prefill, topk
from shoal.kernels.triton import attention_hopper as hopper
from tests.kernels.triton.compiler import SHARED_BYTES, Case, compile_cases, compile_modules

MODULES = (attention, hopper, indexer, prefill, topk)
ELEMENTS = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}


def integers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32!")


def split_options(options: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Constants of the kernel, and options of the compiler."""
    return {k: v for k, v in options.items() if k != "num_warps"}, {"num_warps": options["num_warps"]}


def list_kernels() -> Iterator[Case]:
    sizes = integers("num_sequences", "width", "max_blocks", "block_size", "num_slots")
    pointers = dict.fromkeys(("cu_seqlens_q", "block_tables", "sequences", "slots", "lengths"), "*i32")
    types = {**pointers, **sizes, "positions": "*i64", "selected": "*i32"}
    for sparse in (False, True):
        yield attention.list_kernel, types, {"SPARSE": sparse, "BLOCK_SEQUENCES": 64, "BLOCK": 2048}, {}
    types = {k: types[k] for k in ("block_tables", "slots", "width", "max_blocks", "block_size", "num_slots")}
    yield attention.expand_kernel, types, {"BLOCK": 1024}, {}


QUERIES = integers("latent_token_stride", "latent_head_stride", "rope_token_stride", "rope_head_stride")
LISTS = dict.fromkeys(("slots", "sequences", "lengths"), "*i32") | integers("slots_stride")
RESULTS = {"partial_out": "*fp32", "partial_stats": "*fp32", "num_tokens": "i32", "num_heads": "i32", "scale": "fp32"}


def attention_kernels(target: int) -> Iterator[Case]:
    capability = divmod(target, 10)
    for dtype, element in ELEMENTS.items():
        types = QUERIES | LISTS | RESULTS | integers("kv_stride")
        types |= dict.fromkeys(("q_latent", "q_rope", "kv_cache", "out"), element)
        types |= {"fp8_values": "*u8", "fp8_scales": "*fp32"}
        for fp8 in (False, True) if dtype == torch.bfloat16 else (False,):
            constants, options = split_options(attention.mla_options(dtype, capability, SHARED_BYTES[target], fp8=fp8))
            constants |= {"LATENT": 512, "ROPE": 64, "BLOCK_LATENT": 512, "BLOCK_ROPE": 64, "SPLIT_KEYS": 2048}
            constants |= {"FP8": fp8, "NATIVE_FP8": target >= 89, "ROPE_OFFSET": 264 if fp8 else 512}
            for sparse, split in ((True, False), (False, True)) if dtype == torch.bfloat16 else ((False, True),):
                yield attention.mla_kernel, types, constants | {"SPARSE": sparse, "SPLIT": split}, options
        merged = {"partial_out": "*fp32", "partial_stats": "*fp32", "lengths": "*i32", "out": element}
        merged |= {"num_tokens": "i32", "num_heads": "i32"}
        constants = {"LATENT": 512, "BLOCK_LATENT": 512, "SPLIT_KEYS": 2048}
        yield attention.merge_kernel, merged, constants, {}


def hopper_kernels() -> Iterator[Case]:
    types = QUERIES | LISTS | RESULTS | integers("kv_stride")
    types |= dict.fromkeys(("q_latent", "q_rope", "kv_cache", "out"), "*bf16")
    types |= {"codes": "*u8", "scales": "*fp32"}
    for sparse, split, fp8 in ((True, False, False), (False, True, False), (True, False, True)):
        constants = {"SPLIT_KEYS": 2048, "SPARSE": sparse, "SPLIT": split, "FP8": fp8}
        yield hopper.mla_kernel, types, constants, {"num_warps": hopper.NUM_WARPS}


def indexer_kernels(target: int) -> Iterator[Case]:
    common = integers("q_token_stride", "q_head_stride", "scores_stride", "num_heads", "num_sequences")
    common |= integers("unscored", "max_blocks", "block_size", "num_blocks")
    common |= {"weights": "*fp32", "scales": "*fp32", "scores": "*fp32", "positions": "*i64"}
    common |= {"block_tables": "*i32", "cu_seqlens_q": "*i32"}
    tiles = {"tile_sequences": "*i32", "tile_tokens": "*i32"}
    for dtype, element in ELEMENTS.items():
        constants, options = split_options(indexer.score_options(dtype))
        constants |= {"DIM": 128, "BLOCK_DIM": 128, "BLOCK_HEADS": 64, "NATIVE_FP8": target >= 89}
        for fp8 in (False, True) if dtype == torch.bfloat16 else (False,):
            types = common | {"q": element, "keys": "*u8" if fp8 else element}
            constants["FP8"] = fp8
            by_token = {"CHUNK_KEYS": indexer.CHUNK_KEYS, "BLOCK_SEQUENCES": 64}
            yield indexer.token_scores_kernel, types, constants | by_token, options
            yield indexer.tile_scores_kernel, types | tiles, constants | {"TILE_TOKENS": indexer.TILE_TOKENS}, options
    types = {"scores": "*fp32", "lengths": "*i64", "listed": "*i32", "out": "*i32"}
    types |= integers("row_stride", "extra", "width", "topk")
    for listed, block in ((False, topk.CHUNK), (True, 4096)):
        yield topk.topk_kernel, types, {"LISTED": listed, "BLOCK": block}, {"num_warps": block // 1024}


def prefill_kernels(target: int) -> Iterator[Case]:
    pointers = dict.fromkeys(("tile_sequences", "tile_tokens", "cu_seqlens_q", "cu_seqlens_k"), "*i32")
    dims = {"NOPE": 128, "ROPE": 64, "VALUE": 128, "BLOCK_NOPE": 128, "BLOCK_ROPE": 64, "BLOCK_VALUE": 128}
    for dtype, element in ELEMENTS.items():
        constants, options = split_options(prefill.prefill_options(dtype, SHARED_BYTES[target]))
        types = dict.fromkeys(("q_nope", "q_rope", "k_nope", "k_rope", "v", "out"), element) | pointers
        for name in ("q_nope", "q_rope", "k_nope", "v"):
            types |= integers(f"{name}_token_stride", f"{name}_head_stride")
        types |= integers("k_rope_token_stride", "num_heads", "num_sequences") | {"positions": "*i64", "scale": "fp32"}
        yield prefill.prefill_kernel, types, constants | dims, options


def compile_all(target: int) -> set[str]:
    cases = [*list_kernels(), *attention_kernels(target), *indexer_kernels(target), *prefill_kernels(target)]
    return compile_cases([*cases, *(hopper_kernels() if target == 90 else ())], target)


if __name__ == "__main__":
    compile_modules(MODULES, compile_all)
