#!/usr/bin/env python3
"""The trained state as a Hugging Face `deepseek_v32` directory in bfloat16, MTP layer included.

python benchmarks/tiny_model/export.py build/tiny-model/state.pt build/tiny-model/shoal-tiny
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from data import BOS, EOS, PAD
from model import CONFIG, TinyModel
from safetensors.torch import save_file
from torch import Tensor

from shoal.runtime.tokenizer import write_byte_tokenizer

IDS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}


def checkpoint_tensors(model: TinyModel) -> dict[str, Tensor]:
    """Every tensor under DeepSeek's name; the MTP layer repeats the embedding and the head, as theirs does."""
    state = model.state_dict()
    mtp = f"model.layers.{model.config['num_hidden_layers']}"
    tensors = {name if name.startswith("lm_head") else f"model.{name}": tensor for name, tensor in state.items()}
    tensors[f"{mtp}.embed_tokens.weight"] = state["embed_tokens.weight"]
    tensors[f"{mtp}.shared_head.head.weight"] = state["lm_head.weight"]
    return {
        name: tensor.clone() if name.endswith("e_score_correction_bias") else tensor.to(torch.bfloat16)
        for name, tensor in tensors.items()
    }


def export(state: Path, directory: Path) -> None:
    model = TinyModel()
    model.load_state_dict(torch.load(state, weights_only=True)["model"])
    directory.mkdir(parents=True, exist_ok=True)
    save_file(checkpoint_tensors(model), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG | IDS, indent=1) + "\n")
    (directory / "generation_config.json").write_text(json.dumps(IDS | {"do_sample": False}, indent=1) + "\n")
    assert write_byte_tokenizer(directory / "tokenizer.json") <= CONFIG["vocab_size"]


if __name__ == "__main__":
    export(Path(sys.argv[1]), Path(sys.argv[2]))
