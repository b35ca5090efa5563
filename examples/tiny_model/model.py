"""shoal-tiny for training: the DeepSeek-V3.2 architecture in plain torch, with DeepSeek's tensor names.

Attention runs per head (not absorbed), whole rows at a time, right-padded. B rows of T tokens, H hidden, h heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Mode = Literal["dense", "warmup", "sparse", "recent"]
"""dense: no indexer. warmup: dense, and the indexer learns from it. sparse: attention sees what the indexer selects.
recent: attention sees as many tokens, the most recent ones; for comparison, not for training."""

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "vocab_size": 272,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 5,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "num_nextn_predict_layers": 1,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 64,
    "torch_dtype": "bfloat16",
}
INDEX_NORM_EPS = 1e-6
FLOOR = 0.5
SAMPLED_QUERIES = 64
"""Per row: how many queries the indexer learns from in a step."""


@dataclass(slots=True)
class Extras:
    """What a forward pass yields besides logits."""

    index_kl: list[Tensor] = field(default_factory=list)
    """Per layer: KL of the attention's distribution over keys from the indexer's, averaged over queries."""
    index_floor: list[Tensor] = field(default_factory=list)
    """Per layer: how far the products of the indexer's first head fall below FLOOR. Where they stay above, no two keys
    tie at a score of exactly zero, and implementations that break ties in another way select the same ones."""
    expert_load: list[Tensor] = field(default_factory=list)
    """Per MoE layer: tokens of each expert, [E]."""


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """[B, T, heads, D] -> rotated; a pair is (i, i + D/2)."""
    cos, sin = (part[: x.shape[1], None] for part in table)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def rope_table(dim: int, theta: float, length: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(length)[:, None] * theta ** (-torch.arange(0, dim, 2) / dim)
    return angles.cos(), angles.sin()


class FusedRMSNorm(torch.autograd.Function):
    """x / rms(x) * weight with the passes over memory that it needs, which are half of what `autograd` would make."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + eps)
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        return unit * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, scale, weight = ctx.saved_tensors
        product = grad * unit
        along = (product @ weight)[..., None] / unit.shape[-1]
        grad_x = torch.addcmul(grad * weight, unit, along, value=-1).mul_(scale)
        return grad_x, product.flatten(0, -2).sum(dim=0), None


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = FusedRMSNorm.apply(x, self.weight, self.eps)
        return out


class Indexer(nn.Module):
    """Scores every key for a query: a few heads, one key per token, no softmax."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.dim, self.rope_dim = c["index_n_heads"], c["index_head_dim"], c["qk_rope_head_dim"]
        self.wq_b = nn.Linear(c["q_lora_rank"], self.heads * self.dim, bias=False)
        self.wk = nn.Linear(c["hidden_size"], self.dim, bias=False)
        self.k_norm = nn.LayerNorm(self.dim, eps=INDEX_NORM_EPS)
        self.weights_proj = nn.Linear(c["hidden_size"], self.heads, bias=False)

    def forward(self, x: Tensor, q_latent: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """-> queries [B, T, h, D], keys [B, T, D], weights [B, T, h]."""
        batch, length, _ = x.shape
        q = self._rotate(self.wq_b(q_latent).view(batch, length, self.heads, self.dim), table)
        k = self._rotate(self.k_norm(self.wk(x)).unsqueeze(2), table).squeeze(2)
        return q, k, self.weights_proj(x) * (self.heads**-0.5 * self.dim**-0.5)

    def _rotate(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat([rotate(x[..., : self.rope_dim], table), x[..., self.rope_dim :]], dim=-1)


def index_scores(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """Queries [B, S, h, D], keys [B, T, D], weights [B, S, h] -> scores [B, S, T], not masked."""
    batch, rows, heads, dim = q.shape
    scores = (q.reshape(batch, rows * heads, dim) @ k.mT).view(batch, rows, heads, -1).relu()
    return (weights.unsqueeze(2) @ scores).squeeze(2)


class Attention(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.topk = c["num_attention_heads"], c["index_topk"]
        self.nope, self.rope, self.value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
        assert self.value == self.nope + self.rope, "torch's fused attention wants heads of one size"
        self.latent = c["kv_lora_rank"]
        hidden, q_rank = c["hidden_size"], c["q_lora_rank"]
        self.q_a_proj = nn.Linear(hidden, q_rank, bias=False)
        self.q_a_layernorm = RMSNorm(q_rank, eps=1e-6)
        self.q_b_proj = nn.Linear(q_rank, self.heads * (self.nope + self.rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.latent + self.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(self.latent, eps=1e-6)
        self.kv_b_proj = nn.Linear(self.latent, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, hidden, bias=False)
        self.indexer = Indexer(c)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor], mode: Mode, extras: Extras) -> Tensor:
        """x [B, T, H] -> [B, T, H]."""
        q, k, v, q_latent = self.project(x, table)
        seen: Tensor | None = None
        if mode == "recent":
            length = x.shape[1]
            older = torch.ones(length, length, dtype=torch.bool).tril(-self.topk)
            seen = torch.zeros(length, length).masked_fill(older | older.new_ones(length, length).triu(1), -torch.inf)
        elif mode != "dense" and x.shape[1] > self.topk:
            seen = self._learn_to_index(x.detach(), q_latent.detach(), q.detach(), k.detach(), table, mode, extras)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def project(self, x: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> queries, keys, values [B, h, T, D], and the latent of the queries [B, T, R]."""
        batch, length, _ = x.shape
        q_latent = self.q_a_layernorm(self.q_a_proj(x))
        q = self.q_b_proj(q_latent).view(batch, length, self.heads, -1)
        q_nope, q_rope = q.split([self.nope, self.rope], dim=-1)
        q = torch.cat([q_nope, rotate(q_rope, table)], dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.latent, self.rope], dim=-1)
        k_rope = rotate(k_rope.unsqueeze(2), table).expand(-1, -1, self.heads, -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(batch, length, self.heads, -1)
        k_nope, v = kv.split([self.nope, self.value], dim=-1)
        k = torch.cat([k_nope, k_rope], dim=-1)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), q_latent

    def _learn_to_index(
        self,
        x: Tensor,
        q_latent: Tensor,
        q: Tensor,
        k: Tensor,
        table: tuple[Tensor, Tensor],
        mode: Mode,
        extras: Extras,
    ) -> Tensor | None:
        """The indexer's loss, from a sample of queries; the mask of its selection [B, 1, T, T] in sparse mode."""
        length = x.shape[1]
        index_q, index_k, weights = self.indexer(x, q_latent, table)
        causal = torch.full((length, length), -torch.inf).triu_(1)
        mask = causal.expand(x.shape[0], length, length)
        if mode == "sparse":
            with torch.no_grad():
                scores = index_scores(index_q, index_k, weights).add_(causal)
                # the topk-th best score of each query; a query that sees no more than topk keys keeps them all
                kth = np.partition(scores.numpy(), length - self.topk, axis=-1)[..., length - self.topk, None]
                mask = causal.expand_as(scores).masked_fill(scores < torch.from_numpy(kth), -torch.inf)
        rows = torch.randperm(length)[:SAMPLED_QUERIES]
        attended = (q[:, :, rows] @ k.mT) / math.sqrt(self.nope + self.rope) + mask[:, None, rows]
        target = attended.softmax(dim=-1).mean(dim=1)
        seen = mask[:, rows] == 0
        log_index = (index_scores(index_q[:, rows], index_k, weights[:, rows]) + mask[:, rows]).log_softmax(dim=-1)
        kl = target * (target.clamp_min(1e-9).log() - log_index.masked_fill(~seen, 0.0))
        extras.index_kl.append(kl.sum(dim=-1).mean())
        first_head = index_q[:, rows, 0] @ index_k.mT
        extras.index_floor.append(((FLOOR - first_head).relu() * seen).sum() / seen.sum())
        return mask[:, None] if mode == "sparse" else None


class MLP(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Gate(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.c = c
        self.weight = nn.Parameter(torch.empty(c["n_routed_experts"], c["hidden_size"]))
        self.register_buffer("e_score_correction_bias", torch.zeros(c["n_routed_experts"]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, H] -> (experts [N, K], weights [N, K])."""
        c = self.c
        probs = (x @ self.weight.T).sigmoid()
        scores = probs.detach() + self.e_score_correction_bias
        groups = scores.view(len(x), c["n_group"], -1)
        best_groups = groups.topk(2, dim=-1).values.sum(-1).topk(c["topk_group"], dim=-1).indices
        kept = torch.zeros(len(x), c["n_group"], dtype=torch.bool).scatter_(1, best_groups, True)
        chosen = groups.masked_fill(~kept[..., None], -torch.inf).flatten(1).topk(c["num_experts_per_tok"], -1).indices
        weights = probs.gather(1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * c["routed_scaling_factor"]


class RoutedExperts(torch.autograd.Function):
    """Every expert's SwiGLU over the tokens routed to it, weighted and summed per token.

    Products go into buffers made once, and a token's K results are gathered next to each other, both ways.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor, counts: list[int]
    ) -> Tensor:
        """x [N, H], gate_up [E, 2I, H], down [E, H, I], chosen and weights [N, K], counts: rows of each expert."""
        slots = chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)  # (token, slot) pairs grouped by expert
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        rows = x.index_select(0, order // slots)
        inner = rows.new_empty(len(rows), gate_up.shape[1])
        for r, w, y in zip(rows.split(counts), gate_up, inner.split(counts), strict=True):
            torch.mm(r, w.T, out=y)
        gate, up = inner.chunk(2, dim=-1)
        activated = F.silu(gate) * up
        row_weights = weights.flatten()[order, None]
        weighted = activated * row_weights
        out = torch.empty_like(rows)
        for r, w, y in zip(weighted.split(counts), down, out.split(counts), strict=True):
            torch.mm(r, w.T, out=y)
        ctx.save_for_backward(rows, gate_up, down, inner, activated, weighted, row_weights, order, place)
        ctx.counts, ctx.slots = counts, slots
        return out.index_select(0, place).view(-1, slots, x.shape[1]).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, gate_up, down, inner, activated, weighted, row_weights, order, place = ctx.saved_tensors
        counts: list[int] = ctx.counts
        grad = grad.index_select(0, order // ctx.slots)
        grad_weighted, grad_down = torch.empty_like(weighted), torch.empty_like(down)
        for g, w, r, gr, gw in zip(
            grad.split(counts), down, weighted.split(counts), grad_weighted.split(counts), grad_down, strict=True
        ):
            torch.mm(g, w, out=gr)
            torch.mm(g.T, r, out=gw)
        grad_weights = (grad_weighted * activated).sum(dim=-1)[place].view(-1, ctx.slots)
        grad_activated = grad_weighted * row_weights
        gate, up = inner.chunk(2, dim=-1)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        grad_inner = torch.cat([grad_activated * up * (sigmoid + silu - silu * sigmoid), grad_activated * silu], dim=-1)
        grad_rows, grad_gate_up = torch.empty_like(rows), torch.empty_like(gate_up)
        for g, w, r, gr, gw in zip(
            grad_inner.split(counts), gate_up, rows.split(counts), grad_rows.split(counts), grad_gate_up, strict=True
        ):
            torch.mm(g, w, out=gr)
            torch.mm(g.T, r, out=gw)
        grad_x = grad_rows.index_select(0, place).view(-1, ctx.slots, rows.shape[1]).sum(dim=1)
        return grad_x, grad_gate_up, grad_down, None, grad_weights, None


class Experts(nn.Module):
    """All routed experts of a layer as two stacks; E experts, I inner."""

    def __init__(self, num_experts: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2, inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, inner))


class MoE(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        hidden, inner = c["hidden_size"], c["moe_intermediate_size"]
        self.num_experts = c["n_routed_experts"]
        self.gate = Gate(c)
        self.experts = Experts(self.num_experts, hidden, inner)
        self.shared_experts = MLP(hidden, inner * c["n_shared_experts"])

    def forward(self, x: Tensor, real: Tensor, extras: Extras) -> Tensor:
        flat = x.flatten(0, 1)
        chosen, weights = self.gate(flat)
        counts = chosen.flatten().bincount(minlength=self.num_experts).tolist()
        stacks = self.experts.gate_up_proj.flatten(1, 2), self.experts.down_proj
        routed = RoutedExperts.apply(flat, *stacks, chosen, weights, counts)
        extras.expert_load.append(chosen[real.flatten()].flatten().bincount(minlength=self.num_experts))
        return (routed + self.shared_experts(flat)).view_as(x)


class Layer(nn.Module):
    def __init__(self, c: dict[str, Any], *, dense: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c["hidden_size"], eps=c["rms_norm_eps"])
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c["hidden_size"], eps=c["rms_norm_eps"])
        self.mlp = MLP(c["hidden_size"], c["intermediate_size"]) if dense else MoE(c)

    def forward(self, h: Tensor, table: tuple[Tensor, Tensor], mode: Mode, real: Tensor, extras: Extras) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h), table, mode, extras)
        x = self.post_attention_layernorm(h)
        return h + (self.mlp(x, real, extras) if isinstance(self.mlp, MoE) else self.mlp(x))


class MTPLayer(Layer):
    """Predicts the token after the next: from the hidden state and the next token's embedding."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__(c, dense=False)
        hidden = c["hidden_size"]
        self.enorm = RMSNorm(hidden, eps=c["rms_norm_eps"])
        self.hnorm = RMSNorm(hidden, eps=c["rms_norm_eps"])
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(hidden, eps=c["rms_norm_eps"])})


class TinyModel(nn.Module):
    def __init__(self, config: dict[str, Any] = CONFIG, *, max_length: int = 1408) -> None:
        super().__init__()
        c = self.config = config
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        dense_first = c["first_k_dense_replace"]
        layers = [Layer(c, dense=i < dense_first) for i in range(c["num_hidden_layers"])]
        self.layers = nn.ModuleList([*layers, MTPLayer(c)])
        self.norm = RMSNorm(c["hidden_size"], eps=c["rms_norm_eps"])
        self.lm_head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)
        self.table = rope_table(c["qk_rope_head_dim"], c["rope_theta"], max_length)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                std = 0.02 if "embed_tokens" in name else parameter.shape[-1] ** -0.5
                nn.init.normal_(parameter, std=std)

    def forward(self, tokens: Tensor, real: Tensor, mode: Mode) -> tuple[Tensor, Tensor, Extras]:
        """tokens [B, T] -> (their embeddings, hidden states for the next token, normed; both [B, T, H])."""
        extras = Extras()
        embedded = self.embed_tokens(tokens)
        h = embedded
        for layer in self.layers[:-1]:
            h = layer(h, self.table, mode, real, extras)
        return embedded, self.norm(h), extras

    def predict_after_next(self, embedded: Tensor, hidden: Tensor, real: Tensor, mode: Mode, extras: Extras) -> Tensor:
        """The MTP layer: hidden states for the token after the next, normed [B, T, H].

        They are for positions whose next token is known: the last position's is meaningless.
        """
        mtp = self.layers[-1]
        assert isinstance(mtp, MTPLayer)
        joined = torch.cat([mtp.enorm(embedded.roll(-1, dims=1)), mtp.hnorm(hidden)], dim=-1)
        h: Tensor = mtp(mtp.eh_proj(joined), self.table, mode, real, extras)
        out: Tensor = mtp.shared_head["norm"](h)
        return out
