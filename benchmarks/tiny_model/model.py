"""shoal-tiny for training: the DeepSeek-V3.2 architecture in plain torch, with DeepSeek's tensor names.

Attention runs per head (not absorbed), whole rows at a time, right-padded. B rows of T tokens, H hidden, h heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Mode = Literal["dense", "warmup", "sparse"]
"""dense: no indexer. warmup: dense, and the indexer learns from it. sparse: attention sees what the indexer selects."""

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
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
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
    "index_n_heads": 8,
    "index_head_dim": 64,
    "index_topk": 64,
    "torch_dtype": "bfloat16",
}
INDEX_NORM_EPS = 1e-6


@dataclass(slots=True)
class Extras:
    """What a forward pass yields besides logits."""

    index_kl: list[Tensor] = field(default_factory=list)
    """Per layer: KL of the attention's distribution over keys from the indexer's, averaged over queries."""
    expert_load: list[Tensor] = field(default_factory=list)
    """Per MoE layer: tokens of each expert, [E]."""


def rotate(x: Tensor, table: tuple[Tensor, Tensor], *, interleaved: bool) -> Tensor:
    """[B, T, heads, D] -> rotated, the pairs' first members before their second ones."""
    cos, sin = (part[: x.shape[1], None] for part in table)
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def rope_table(dim: int, theta: float, length: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(length)[:, None] * theta ** (-torch.arange(0, dim, 2) / dim)
    return angles.cos(), angles.sin()


class Indexer(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.dim, self.rope_dim = c["index_n_heads"], c["index_head_dim"], c["qk_rope_head_dim"]
        self.wq_b = nn.Linear(c["q_lora_rank"], self.heads * self.dim, bias=False)
        self.wk = nn.Linear(c["hidden_size"], self.dim, bias=False)
        self.k_norm = nn.LayerNorm(self.dim, eps=INDEX_NORM_EPS)
        self.weights_proj = nn.Linear(c["hidden_size"], self.heads, bias=False)

    def forward(self, x: Tensor, q_latent: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """-> scores of every key for every query [B, T, T], not masked."""
        batch, length, _ = x.shape
        q = self._rotate(self.wq_b(q_latent).view(batch, length, self.heads, self.dim), table)
        k = self._rotate(self.k_norm(self.wk(x)).unsqueeze(2), table).squeeze(2)
        weights = self.weights_proj(x) * (self.heads**-0.5 * self.dim**-0.5)
        scores = torch.einsum("bqhd,bkd->bqhk", q, k).relu()
        return torch.einsum("bqhk,bqh->bqk", scores, weights)

    def _rotate(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        rotated = rotate(x[..., : self.rope_dim], table, interleaved=False)
        return torch.cat([rotated, x[..., self.rope_dim :]], dim=-1)


class Attention(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.topk = c["num_attention_heads"], c["index_topk"]
        self.nope, self.rope, self.value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
        self.latent = c["kv_lora_rank"]
        hidden, q_rank = c["hidden_size"], c["q_lora_rank"]
        self.q_a_proj = nn.Linear(hidden, q_rank, bias=False)
        self.q_a_layernorm = nn.RMSNorm(q_rank, eps=1e-6)
        self.q_b_proj = nn.Linear(q_rank, self.heads * (self.nope + self.rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.latent + self.rope, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(self.latent, eps=1e-6)
        self.kv_b_proj = nn.Linear(self.latent, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, hidden, bias=False)
        self.indexer = Indexer(c)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor], mode: Mode, real: Tensor, extras: Extras) -> Tensor:
        """x [B, T, H], real [B, T] (not padding) -> [B, T, H]."""
        batch, length, _ = x.shape
        q_latent = self.q_a_layernorm(self.q_a_proj(x))
        q = self.q_b_proj(q_latent).view(batch, length, self.heads, -1)
        q = torch.cat([q[..., : self.nope], rotate(q[..., self.nope :], table, interleaved=True)], dim=-1)
        kv_a = self.kv_a_proj_with_mqa(x)
        k_rope = rotate(kv_a[:, :, None, self.latent :], table, interleaved=True)
        kv = self.kv_b_proj(self.kv_a_layernorm(kv_a[..., : self.latent])).view(batch, length, self.heads, -1)
        k = torch.cat([kv[..., : self.nope], k_rope.expand(-1, -1, self.heads, -1)], dim=-1)
        q, k, v = (part.transpose(1, 2) for part in (q, k, kv[..., self.nope :]))

        if mode == "dense" or (mode == "sparse" and length <= self.topk):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            out = self._indexed(x, q_latent, q, k, v, table, mode, real, extras)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _indexed(
        self,
        x: Tensor,
        q_latent: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        table: tuple[Tensor, Tensor],
        mode: Mode,
        real: Tensor,
        extras: Extras,
    ) -> Tensor:
        length = x.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        index_scores = self.indexer(x.detach(), q_latent.detach(), table).masked_fill(~seen, -torch.inf)
        if mode == "sparse":
            best = index_scores.detach().topk(self.topk, dim=-1).indices
            seen = torch.zeros_like(index_scores, dtype=torch.bool).scatter_(-1, best, True) & seen
        else:
            seen = seen.expand_as(index_scores)
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(self.nope + self.rope)
        probs = scores.masked_fill(~seen[:, None], -torch.inf).softmax(dim=-1)
        target = probs.detach().mean(dim=1)
        log_index = index_scores.masked_fill(~seen, -torch.inf).log_softmax(dim=-1).masked_fill(~seen, 0.0)
        kl = (target * (target.clamp_min(1e-9).log() - log_index)).sum(dim=-1)
        extras.index_kl.append(kl[real].mean())
        return probs @ v


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


class MoE(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        hidden, inner = c["hidden_size"], c["moe_intermediate_size"]
        self.gate = Gate(c)
        self.experts = nn.ModuleList(MLP(hidden, inner) for _ in range(c["n_routed_experts"]))
        self.shared_experts = MLP(hidden, inner * c["n_shared_experts"])

    def forward(self, x: Tensor, real: Tensor, extras: Extras) -> Tensor:
        flat = x.flatten(0, 1)
        chosen, weights = self.gate(flat)
        # (token, slot) pairs, grouped by expert: each expert sees its tokens at once
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        tokens = order // chosen.shape[1]
        outputs = [expert(rows) for expert, rows in zip(self.experts, flat[tokens].split(counts), strict=True)]
        weighted = torch.cat(outputs) * weights.flatten()[order, None]
        routed = torch.zeros_like(flat).index_add(0, tokens, weighted)
        extras.expert_load.append(chosen[real.flatten()].flatten().bincount(minlength=len(self.experts)))
        return (routed + self.shared_experts(flat)).view_as(x)


class Layer(nn.Module):
    def __init__(self, c: dict[str, Any], *, dense: bool) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c["hidden_size"], eps=c["rms_norm_eps"])
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c["hidden_size"], eps=c["rms_norm_eps"])
        self.mlp = MLP(c["hidden_size"], c["intermediate_size"]) if dense else MoE(c)

    def forward(self, h: Tensor, table: tuple[Tensor, Tensor], mode: Mode, real: Tensor, extras: Extras) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h), table, mode, real, extras)
        x = self.post_attention_layernorm(h)
        return h + (self.mlp(x, real, extras) if isinstance(self.mlp, MoE) else self.mlp(x))


class MTPLayer(Layer):
    """Predicts the token after the next: from the hidden state and the next token's embedding."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__(c, dense=False)
        hidden = c["hidden_size"]
        self.enorm = nn.RMSNorm(hidden, eps=c["rms_norm_eps"])
        self.hnorm = nn.RMSNorm(hidden, eps=c["rms_norm_eps"])
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.shared_head = nn.ModuleDict({"norm": nn.RMSNorm(hidden, eps=c["rms_norm_eps"])})


class TinyModel(nn.Module):
    def __init__(self, config: dict[str, Any] = CONFIG, *, max_length: int = 1408) -> None:
        super().__init__()
        c = self.config = config
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        dense_first = c["first_k_dense_replace"]
        layers = [Layer(c, dense=i < dense_first) for i in range(c["num_hidden_layers"])]
        self.layers = nn.ModuleList([*layers, MTPLayer(c)])
        self.norm = nn.RMSNorm(c["hidden_size"], eps=c["rms_norm_eps"])
        self.lm_head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)
        self.table = rope_table(c["qk_rope_head_dim"], c["rope_theta"], max_length)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = 0.02 if "embed_tokens" in name else parameter.shape[1] ** -0.5
                nn.init.normal_(parameter, std=std)

    def forward(self, tokens: Tensor, real: Tensor, mode: Mode) -> tuple[Tensor, Tensor, Extras]:
        """tokens [B, T] -> (hidden states for the next token, for the one after it; both normed, [B, T, H]).

        The second ones are for positions whose next token is known: the last position's is meaningless.
        """
        extras = Extras()
        embedded = self.embed_tokens(tokens)
        h = embedded
        for layer in self.layers[:-1]:
            h = layer(h, self.table, mode, real, extras)
        final = self.norm(h)
        mtp = self.layers[-1]
        assert isinstance(mtp, MTPLayer)
        joined = torch.cat([mtp.enorm(embedded.roll(-1, dims=1)), mtp.hnorm(final)], dim=-1)
        h_mtp = mtp(mtp.eh_proj(joined), self.table, mode, real, extras)
        return final, mtp.shared_head["norm"](h_mtp), extras
