"""Roofline of a machine: its two peak rates, and the least time in which a kernel or a workload can run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from shoal.runtime.models.config import ModelConfig

BYTES_PER_VALUE = 2
"""Bytes of an activation or KV cache value in bfloat16."""


@dataclass(frozen=True, slots=True)
class Peaks:
    """Measured peak rates of a machine."""

    flops_per_s: float
    """Peak rate of a bfloat16 GEMM."""
    bytes_per_s: float
    """Peak rate of a memory read."""

    def seconds(self, flops: float, num_bytes: float) -> float:
        """Least time for `flops` operations on `num_bytes` bytes of memory."""
        return max(flops / self.flops_per_s, num_bytes / self.bytes_per_s)

    def best(self, other: Peaks) -> Peaks:
        """The higher rates of two measurements."""
        return Peaks(max(self.flops_per_s, other.flops_per_s), max(self.bytes_per_s, other.bytes_per_s))

    def binding(self, flops: float, num_bytes: float) -> str:
        """The peak that limits this work: "compute" or "memory"."""
        return "compute" if flops / self.flops_per_s > num_bytes / self.bytes_per_s else "memory"


def measure_device_peaks(device: torch.device, *, matrix_size: int = 8192, num_bytes: int = 1 << 31) -> Peaks:
    """Measured peaks of a GPU: the best of several square GEMMs and of several copies, which read and write."""
    x, y = (torch.randn(matrix_size, matrix_size, dtype=torch.bfloat16, device=device) for _ in range(2))
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return Peaks(
        flops_per_s=2 * matrix_size**3 / min(event_seconds(lambda: torch.mm(x, y.T)) for _ in range(10)),
        bytes_per_s=2 * num_bytes / min(event_seconds(lambda: target.copy_(source)) for _ in range(10)),
    )


def event_seconds(call: Callable[[], object]) -> float:
    """Seconds that the current GPU takes for the work `call` launches."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def measure_peaks(*, matrix_size: int = 4096, read_bytes: int = 1 << 29, repeats: int = 5) -> Peaks:
    """Peaks of the CPU with torch's threads: the best of `repeats` square GEMMs and of `repeats` sums over an array."""
    x, y = (torch.randn(matrix_size, matrix_size).bfloat16() for _ in range(2))
    array = torch.ones(read_bytes // 4)
    return Peaks(
        flops_per_s=2 * matrix_size**3 / _best(lambda: torch.mm(x, y.T), repeats),
        bytes_per_s=read_bytes / _best(array.sum, repeats),
    )


def _best(call: Callable[[], object], repeats: int) -> float:
    call()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def workload_limit(config: ModelConfig, peaks: Peaks, *, requests: int, prompt: int, output: int) -> float:
    """Least seconds for `requests` equal prompts: one step for all of them, then one for each further output token."""
    steps = [prefill_cost(config, requests, prompt)]
    steps += [decode_cost(config, requests, prompt + i) for i in range(1, output)]
    return sum(peaks.seconds(flops, num_bytes) for flops, num_bytes in steps)


def prefill_cost(config: ModelConfig, requests: int, length: int) -> tuple[float, float]:
    """(operations, bytes of memory) of a step over whole prompts, with keys and values of every head, causal."""
    head = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    attended = sum(attended_tokens(config, context) for context in range(1, length + 1))
    scored = sum(scored_tokens(config, context) for context in range(1, length + 1))
    flops, num_bytes = _token_cost(config, requests * length, requests)
    flops += _attention_flops(config, requests * attended, head) + _indexer_flops(config, requests * scored)
    return flops, num_bytes


def decode_cost(config: ModelConfig, requests: int, context: int) -> tuple[float, float]:
    """(operations, bytes of memory) of one token for each sequence of `context` tokens, over the cached latents."""
    record = config.kv_lora_rank + config.qk_rope_head_dim
    attended = requests * attended_tokens(config, context)
    scored = requests * scored_tokens(config, context)
    flops, num_bytes = _token_cost(config, requests, requests)
    flops += _attention_flops(config, attended, record + config.kv_lora_rank) + _indexer_flops(config, scored)
    num_bytes += BYTES_PER_VALUE * config.num_hidden_layers * attended * record
    num_bytes += BYTES_PER_VALUE * _num_indexers(config) * scored * config.index_head_dim
    return flops, num_bytes


def attended_tokens(config: ModelConfig, context: int) -> int:
    """Positions that a token attends to, of its context."""
    return min(context, config.index_topk) if config.has_index else context


def scored_tokens(config: ModelConfig, context: int) -> int:
    """Positions that the indexer scores for a token: none as long as all are selected."""
    return context if config.has_index and context > config.index_topk else 0


def _attention_flops(config: ModelConfig, pairs: int, width: int) -> float:
    """FLOPs of scores and weighted sums: `width` multiply-adds per head and (query, key) pair of a layer."""
    return 2.0 * config.num_hidden_layers * config.num_attention_heads * pairs * width


def _indexer_flops(config: ModelConfig, pairs: int) -> float:
    if not config.has_index:
        return 0.0
    return 2.0 * _num_indexers(config) * config.index_n_heads * pairs * config.index_head_dim


def _num_indexers(config: ModelConfig) -> int:
    return sum(config.has_indexer(layer) for layer in range(config.num_hidden_layers))


def _token_cost(config: ModelConfig, tokens: int, logits: int) -> tuple[float, float]:
    """(FLOPs, bytes) of everything but attention over a context; each weight that some token needs is read once."""
    c = config
    hidden, heads, num_layers = c.hidden_size, c.num_attention_heads, c.num_hidden_layers
    q_rank = c.q_lora_rank or 0
    attention = hidden * q_rank + (q_rank or hidden) * heads * c.qk_head_dim
    attention += hidden * (c.kv_lora_rank + c.qk_rope_head_dim)
    attention += c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim) + heads * c.v_head_dim * hidden
    expert = 3 * hidden * c.moe_intermediate_size
    num_moe = sum(c.is_moe_layer(layer) for layer in range(num_layers))
    always = num_layers * attention + (num_layers - num_moe) * 3 * hidden * c.intermediate_size
    always += num_moe * (expert * c.n_shared_experts + hidden * c.n_routed_experts)
    if c.has_index:
        indexer = q_rank * c.index_n_heads * c.index_head_dim + hidden * (c.index_head_dim + c.index_n_heads)
        always += _num_indexers(c) * indexer
    experts_hit = c.n_routed_experts * (1 - (1 - c.num_experts_per_tok / c.n_routed_experts) ** tokens)
    head = c.vocab_size * hidden
    flops = 2.0 * tokens * (always + num_moe * c.num_experts_per_tok * expert) + 2.0 * logits * head
    bytes_per_weight = 1 if c.weight_block_size is not None else BYTES_PER_VALUE
    return flops, bytes_per_weight * (always + num_moe * experts_hit * expert) + BYTES_PER_VALUE * head
