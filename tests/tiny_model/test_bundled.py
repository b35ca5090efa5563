"""shoal-tiny as it ships: its files, the same logits in transformers, and answers to questions it has not seen."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers

from shoal import LLM, SamplingParams
from shoal.cluster.bundled import BUNDLED_MODEL, questions
from shoal.cluster.commands.eval import final_answer
from shoal.cluster.openai.chat_options import ChatOptions
from shoal.cluster.prompts import ModelPrompts
from shoal.runtime.chat.formats import CHAT_FORMATS
from shoal.runtime.tokenization.tokenizer import Tokenizer
from tests.support.harness import logits_in_chunks, make_runner

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


def test_the_checkpoint_is_small_and_has_its_mtp_layer() -> None:
    assert {path.name for path in BUNDLED_MODEL.iterdir()} == FILES
    assert (BUNDLED_MODEL / "model.safetensors").stat().st_size < 16_000_000
    config = json.loads((BUNDLED_MODEL / "config.json").read_text())
    assert (config["architectures"], config["num_nextn_predict_layers"]) == (["DeepseekV32ForCausalLM"], 1)
    header = (BUNDLED_MODEL / "model.safetensors").read_bytes()[8:100_000].decode(errors="replace")
    for name in ("eh_proj.weight", "self_attn.indexer.wk.weight", "mlp.experts.0.gate_proj.weight"):
        assert f'"model.layers.{config["num_hidden_layers"]}.{name}"' in header


def test_the_wheel_has_the_model_and_the_questions(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    subprocess.run(build, cwd=ROOT, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"shoal/bundled/shoal-tiny/{name}" for name in FILES} | {"shoal/bundled/eval.jsonl"} <= names


@pytest.mark.parametrize(("task", "thinking"), [("addition", True), ("copying", False), ("lookup", True)])
def test_logits_are_those_of_transformers(task: str, thinking: bool) -> None:
    tokenizer = Tokenizer.from_pretrained(BUNDLED_MODEL)
    assert tokenizer is not None
    row = questions([task], limit=1)[0]
    prompts = ModelPrompts(tokenizer, CHAT_FORMATS["deepseek_v31"])
    prompt = prompts.encode_chat([{"role": "user", "content": row.question}], ChatOptions(thinking=thinking)).token_ids
    model = transformers.DeepseekV32ForCausalLM.from_pretrained(
        BUNDLED_MODEL, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0]
    logits = logits_in_chunks(make_runner(BUNDLED_MODEL, num_blocks=80), prompt, [len(prompt)])
    assert float(expected.abs().max()) > 5.0
    assert float((logits - expected).abs().max()) < 2e-4


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_it_answers_what_it_has_not_seen(kv_cache_dtype: str) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=160)
    with LLM(num_threads_per_worker=1, kv_cache_dtype=kv_cache_dtype) as llm:
        for task in ("addition", "reversing", "lookup"):
            rows = questions([task], limit=10)
            outputs = llm.chat([[{"role": "user", "content": row.question}] for row in rows], params, thinking=True)
            right = sum(final_answer(o) == row.answer for o, row in zip(outputs, rows, strict=True))
            assert right >= 8, (task, right)
