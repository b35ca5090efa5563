#!/usr/bin/env python3
"""The trained state as a Hugging Face `deepseek_v32` directory in bfloat16, MTP layer included, and back.

python examples/tiny_model/export.py build/tiny-model/state.pt shoal/bundled/shoal-tiny
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from data import BOS, EOS, PAD
from model import CONFIG, TinyModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoal.runtime.tokenization.byte_tokenizer import write_byte_tokenizer

IDS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
MTP = f"model.layers.{CONFIG['num_hidden_layers']}"


def to_checkpoint(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor under DeepSeek's name; the MTP layer repeats the embedding and the head, as theirs does."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stem, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for e, (gate, up) in enumerate(tensor):
                tensors[f"model.{stem}.{e}.gate_proj.weight"], tensors[f"model.{stem}.{e}.up_proj.weight"] = gate, up
        elif last == "down_proj":
            tensors |= {f"model.{stem}.{e}.down_proj.weight": down for e, down in enumerate(tensor)}
        else:
            tensors[name if name.startswith("lm_head") else f"model.{name}"] = permute_rope(name, tensor, inverse=False)
    tensors[f"{MTP}.embed_tokens.weight"] = state["embed_tokens.weight"]
    tensors[f"{MTP}.shared_head.head.weight"] = state["lm_head.weight"]
    return {
        name: (tensor if name.endswith("e_score_correction_bias") else tensor.to(torch.bfloat16)).clone()
        for name, tensor in tensors.items()
    }


def from_checkpoint(directory: Path) -> TinyModel:
    """The model of a directory that `export` wrote, in float32."""
    tensors = load_file(directory / "model.safetensors")
    model = TinyModel()
    state = {}
    for name in model.state_dict():
        stem, _, last = name.rpartition(".")
        experts = [f"model.{stem}.{e}" for e in range(CONFIG["n_routed_experts"])]
        if last == "gate_up_proj":
            pairs = [[tensors[f"{e}.{part}_proj.weight"] for part in ("gate", "up")] for e in experts]
            state[name] = torch.stack([torch.stack(pair) for pair in pairs])
        elif last == "down_proj":
            state[name] = torch.stack([tensors[f"{e}.down_proj.weight"] for e in experts])
        else:
            tensor = tensors[name if name.startswith("lm_head") else f"model.{name}"]
            state[name] = permute_rope(name, tensor, inverse=True)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model.eval()


def permute_rope(name: str, weight: Tensor, *, inverse: bool) -> Tensor:
    """Rotated pairs are (i, i + D/2) in training and neighbours in the checkpoint; other tensors stay as they are.

    training:   a0 a1 a2 b0 b1 b2
    checkpoint: a0 b0 a1 b1 a2 b2
    """
    nope, rope, latent = CONFIG["qk_nope_head_dim"], CONFIG["qk_rope_head_dim"], CONFIG["kv_lora_rank"]
    pairs = torch.arange(rope).view(2, -1).T.flatten()
    pairs = pairs.argsort() if inverse else pairs
    if name.endswith("self_attn.q_b_proj.weight"):
        head = torch.cat([torch.arange(nope), nope + pairs])
        rows = torch.arange(CONFIG["num_attention_heads"])[:, None] * (nope + rope) + head
        return weight[rows.flatten()]
    if name.endswith("self_attn.kv_a_proj_with_mqa.weight"):
        return weight[torch.cat([torch.arange(latent), latent + pairs])]
    return weight


def export(state: Path, directory: Path) -> None:
    """Write the model directory of a training state."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = to_checkpoint(torch.load(state, weights_only=True)["model"])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # it would be the owner's alone
    (directory / "config.json").write_text(json.dumps(CONFIG | IDS, indent=1) + "\n")
    (directory / "generation_config.json").write_text(json.dumps(IDS | {"do_sample": False}, indent=1) + "\n")
    assert write_byte_tokenizer(directory / "tokenizer.json") <= CONFIG["vocab_size"]


if __name__ == "__main__":
    export(Path(sys.argv[1]), Path(sys.argv[2]))
