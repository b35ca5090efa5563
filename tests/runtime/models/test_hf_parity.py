"""Logits and selections against transformers, on random small models of every architecture.

transformers computes the unabsorbed, unpaged, unchunked form: all that this engine does differently is tested.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from shoal.runtime.random_checkpoint import make_checkpoint
from tests.support.harness import logits_in_chunks, make_runner, record_tap

pytestmark = pytest.mark.slow

YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
HF_CLASS = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
}


@dataclass(frozen=True)
class Case:
    """A model and a context length."""

    model_type: str
    length: int
    overrides: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{k}={'yarn' if k == 'rope_scaling' else v}" for k, v in self.overrides.items()]
        return "-".join([self.model_type, str(self.length), *parts])


CASES = [
    Case("deepseek_v3", 33),
    Case("deepseek_v3", 70, {"rope_scaling": YARN, "num_attention_heads": 5, "num_key_value_heads": 5}),
    Case("deepseek_v3", 1, {"n_group": 1, "topk_group": 1}),
    Case("deepseek_v3", 48, {"n_shared_experts": 2, "first_k_dense_replace": 0, "num_experts_per_tok": 1}),
    Case("kimi_k2", 40, {"rope_scaling": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0}, "n_group": 1, "topk_group": 1}),
    Case("deepseek_v32", 32, {"index_topk": 4}),
    Case("deepseek_v32", 64, {"index_topk": 8, "rope_scaling": YARN}),
    Case("deepseek_v32", 96, {"index_topk": 32, "num_attention_heads": 3, "num_key_value_heads": 3}),
    Case("deepseek_v32", 7, {"index_topk": 16, "index_n_heads": 3}),
    Case("deepseek_v32", 100, {"index_topk": 16, "first_k_dense_replace": 2, "rope_scaling": YARN}),
    Case("glm_moe_dsa", 64, {"index_topk": 8}),
    Case(
        "glm_moe_dsa",
        72,
        {"index_topk": 16, "indexer_types": ["full", "shared", "full", "shared"], "num_hidden_layers": 4},
    ),
    Case("glm_moe_dsa", 1, {"index_topk": 4}),
    # Moonlight, GigaChat3-10B and Kanana-2: queries without a latent
    Case("deepseek_v3", 60, {"q_lora_rank": None, "rms_norm_eps": 1e-5, "rope_theta": 50000}),
    Case("deepseek_v3", 34, {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2}),
    Case("glm4_moe_lite", 66),
    Case("glm4_moe_lite", 35, {"q_lora_rank": None, "num_attention_heads": 5, "num_key_value_heads": 5}),
]


def reference(model_dir: Path, model_type: str, token_ids: list[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """transformers' logits [T, V], and per layer with an indexer its selection [T, k]."""
    if model_type == "kimi_k2":
        config_path = model_dir / "config.json"
        original = config_path.read_text()
        config_path.write_text(json.dumps({**json.loads(original), "model_type": "deepseek_v3"}))
    model = getattr(transformers, HF_CLASS[model_type]).from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager"
    )
    if model_type == "kimi_k2":
        config_path.write_text(original)
    selections: dict[int, Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        if (indexer := getattr(layer.self_attn, "indexer", None)) is not None:
            indexer.register_forward_hook(lambda _m, _i, out, index=index: selections.__setitem__(index, out[0]))
    with torch.inference_mode():
        logits = model(torch.tensor([token_ids])).logits[0].float()
    return logits, selections


def as_sets(selected: Tensor, first: int) -> list[set[int]]:
    """Selected positions of the tokens from `first` on; what a token cannot see (or padding) does not count."""
    return [{int(p) for p in row if 0 <= p <= t} for t, row in enumerate(selected, first)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_and_selections_agree_with_transformers(case: Case, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, case.model_type, seed=len(str(case)), dtype=torch.float32, overrides=case.overrides)
    vocab = json.loads((tmp_path / "config.json").read_text())["vocab_size"]
    token_ids = torch.randint(3, vocab, (case.length,), generator=torch.Generator().manual_seed(case.length)).tolist()
    expected, selections = reference(tmp_path, case.model_type, token_ids)
    assert expected.abs().max() >= 5, "flat logits would hide mistakes"

    runner = make_runner(tmp_path, block_size=8)
    prefill = case.length * 2 // 3
    chunked = [5] * (case.length // 5) + ([case.length % 5] if case.length % 5 else [])
    schedules = {
        "one shot": [case.length],
        "chunks of 5": chunked,
        "prefill, then decode": [prefill] * bool(prefill) + [1] * (case.length - prefill),
    }
    for name, chunks in schedules.items():
        seen: dict[int, list[Tensor]] = {}
        runner.tap = record_tap("indexer.topk_indices", seen)
        logits = logits_in_chunks(runner, token_ids, chunks)
        difference = (logits - expected).abs().max().item()
        assert difference <= 2e-4, f"{name}: logits differ by {difference}"
        assert set(seen) == set(selections), f"{name}: layers with a selection"
        for layer, theirs in selections.items():
            first = min(case.length, runner.model.config.index_topk)  # tokens before it see every position
            ours = torch.cat(seen[layer])
            assert len(ours) == case.length - first
            assert as_sets(ours, first) == as_sets(theirs[first:], first), f"{name}: selection of layer {layer}"


def test_yarn_changes_the_logits(tmp_path: Path) -> None:
    """Without it the agreement under YaRN above would prove nothing."""
    token_ids = list(range(3, 35))
    logits = []
    for name, overrides in {"plain": {}, "yarn": {"rope_scaling": YARN}}.items():
        make_checkpoint(tmp_path / name, "deepseek_v3", seed=1, dtype=torch.float32, overrides=overrides)
        logits.append(logits_in_chunks(make_runner(tmp_path / name), token_ids, [32]))
    assert (logits[0] - logits[1]).abs().max() > 0.5


def test_selecting_everything_is_dense_attention(tmp_path: Path) -> None:
    """V3.2 with index_topk >= context is V3 with the same weights, bit for bit."""
    token_ids = list(range(3, 43))
    make_checkpoint(tmp_path, "deepseek_v32", seed=2, dtype=torch.float32, overrides={"index_topk": 64})
    sparse = logits_in_chunks(make_runner(tmp_path), token_ids, [40])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "deepseek_v3"}))
    assert torch.equal(logits_in_chunks(make_runner(tmp_path), token_ids, [40]), sparse)
