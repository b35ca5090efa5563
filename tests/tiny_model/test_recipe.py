"""The training program of shoal-tiny: its own backward passes, its optimizer, its data, and the model it exports."""

from __future__ import annotations

import importlib
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from shoal.cluster.openai.chat_options import ChatOptions
from shoal.cluster.prompts import ModelPrompts
from shoal.runtime.chat.formats import CHAT_FORMATS
from shoal.runtime.tokenization.byte_tokenizer import write_byte_tokenizer
from shoal.runtime.tokenization.tokenizer import Tokenizer
from tests.support.harness import logits_in_chunks, make_runner

pytestmark = pytest.mark.slow

RECIPE = Path(__file__).parents[2] / "examples" / "tiny_model"
MODULES = ("tasks", "data", "model", "optimizer", "export", "train")


@pytest.fixture(scope="module")
def recipe() -> Iterator[Any]:
    """The modules of the training program, which is no package: it is run from its own folder."""
    sys.path.insert(0, str(RECIPE))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(RECIPE))
        for name in MODULES:
            del sys.modules[name]


def test_gradients_of_the_norm(recipe: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, generator=generator, requires_grad=True)
    norm = recipe.model.FusedRMSNorm.apply
    assert torch.allclose(norm(x, weight, 1e-6), F.rms_norm(x, (8,), weight, 1e-6))
    assert torch.autograd.gradcheck(lambda x, w: norm(x, w, 1e-6), (x, weight))


def test_gradients_of_the_experts(recipe: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    num_tokens, hidden, num_experts, inner, slots = 6, 8, 4, 3, 2

    def random_tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)

    x, weights = random_tensor(num_tokens, hidden), random_tensor(num_tokens, slots)
    gate_up, down = random_tensor(num_experts, 2 * inner, hidden), random_tensor(num_experts, hidden, inner)
    chosen = torch.tensor([[0, 1], [1, 3], [3, 0], [1, 0], [3, 1], [0, 3]])  # nobody asks expert 2
    counts = [4, 4, 0, 4]

    def expert(e: int, row: torch.Tensor) -> torch.Tensor:
        return down[e] @ (F.silu(gate_up[e, :inner] @ row) * (gate_up[e, inner:] @ row))

    apply = recipe.model.RoutedExperts.apply
    expected = [sum(weights[n, k] * expert(int(chosen[n, k]), x[n]) for k in range(slots)) for n in range(num_tokens)]
    assert torch.allclose(apply(x, gate_up, down, chosen, weights, counts), torch.stack(expected))  # type: ignore[arg-type]
    assert torch.autograd.gradcheck(
        lambda *tensors: apply(*tensors[:3], chosen, tensors[3], counts), (x, gate_up, down, weights)
    )


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (3, 24, 24)])
def test_muon_makes_singular_values_nearly_equal(recipe: Any, shape: tuple[int, ...]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    update = recipe.optimizer.orthogonalise(matrix)
    values = torch.linalg.svdvals(update)
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3
    # the same directions: U^T X V of the matrix's own decomposition is diagonal
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    aligned = u.mT @ update @ vh.mT
    assert float((aligned - torch.diag_embed(aligned.diagonal(dim1=-2, dim2=-1))).abs().max()) < 1e-3


def test_training_rows_are_prompts_as_they_are_served(recipe: Any, tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer is not None
    prompts = ModelPrompts(tokenizer, CHAT_FORMATS["deepseek_v31"])
    rng = random.Random(3)
    for task, make in recipe.tasks.TASKS.items():
        row = make(rng, 1.0)
        for thinking in (True, False):
            encoded = recipe.data.encode(row, thinking=thinking)
            prompt = prompts.encode_chat(
                [{"role": "user", "content": row.question}], ChatOptions(thinking=thinking)
            ).token_ids
            assert encoded.tokens[: len(prompt)] == prompt
            answer = f"{row.thinking}</think>{row.answer}" if thinking else row.answer
            assert tokenizer.decode(encoded.tokens[len(prompt) : -1]) == answer
            assert encoded.tokens[-1] == tokenizer.special_id("<｜end▁of▁sentence｜>")
            mode = "thinking" if thinking else "direct"
            part = recipe.data.PARTS.index(f"{task}/{mode}")
            assert encoded.part == [-1] * len(prompt) + [part] * (len(encoded.tokens) - len(prompt))


def test_answers_are_right(recipe: Any) -> None:
    rng = random.Random(5)
    for _ in range(50):
        row = recipe.tasks.addition(rng)
        a, b = (int(n) for n in row.key.split("+"))
        assert row.answer == str(a + b)
        assert int("".join(step[-1] for step in row.thinking.split())[::-1]) == (a + b) % 10 ** len(
            row.thinking.split()
        )
        row = recipe.tasks.subtraction(rng)
        a, b = (int(n) for n in row.key.split("-"))
        assert (row.answer, a >= b) == (str(a - b), True)
        row = recipe.tasks.lookup(rng)
        document, question = row.question.split("\n")
        name = question.removeprefix("What is ").removesuffix("?")
        assert [e for e in document.split() if e.startswith(name)] == [name + row.answer]
        assert 128 <= len(document) <= 1024


def test_training_never_sees_a_held_out_question(recipe: Any) -> None:
    rng = random.Random(7)
    for task in recipe.tasks.TASKS:
        rows = recipe.tasks.training_rows(task, rng)
        assert not {next(rows).key for _ in range(200)} & {row.key for row in recipe.tasks.held_out_rows(task, 50)}


def test_the_exported_model_is_the_trained_one(recipe: Any, tmp_path: Path) -> None:
    torch.manual_seed(2)
    trained = recipe.model.TinyModel().eval()
    with torch.no_grad():
        for p in trained.parameters():
            p.copy_(p.bfloat16())  # what the checkpoint can hold
            if p.dim() >= 2:
                p.mul_(2.0)
    for module in trained.modules():
        if isinstance(module, recipe.model.Gate):
            module.e_score_correction_bias.normal_(std=0.1)
    torch.save({"model": trained.state_dict()}, tmp_path / "state.pt")
    recipe.export.export(tmp_path / "state.pt", tmp_path / "model")
    tokens = torch.randint(3, 259, (1, 60), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        _, hidden, _ = trained(tokens, tokens >= 0, "dense")
        expected = trained.lm_head(hidden)[0]
        _, again, _ = recipe.export.from_checkpoint(tmp_path / "model")(tokens, tokens >= 0, "dense")
    assert torch.equal(again, hidden)
    runner = make_runner(tmp_path / "model", dtype=torch.float32, num_blocks=8)
    logits = logits_in_chunks(runner, tokens[0].tolist(), [60])
    assert float(expected.abs().max()) > 3.0
    assert torch.allclose(logits, expected, atol=2e-4)


def test_levels_rise_while_questions_are_answered(recipe: Any) -> None:
    levels = recipe.train.Levels()
    for _ in range(30):
        levels.update({"addition/thinking": (10, 10), "sorting/direct": (5, 10), "recall": (1, 1)})
    assert 0 < levels("addition") <= 30 * recipe.train.LEVEL_STEP
    assert levels("sorting") == levels("copying") == 0


def test_an_interrupted_training_ends_as_one_that_was_not(tmp_path: Path) -> None:
    def run(name: str, *until: str) -> Any:
        command = [sys.executable, str(RECIPE / "train.py"), "--output", str(tmp_path / name), "--steps", "9", *until]
        small = ["--tokens", "120", "--long-tokens", "160"]
        subprocess.run([*command, *small], check=True, timeout=300, capture_output=True)
        return torch.load(tmp_path / name / "state.pt", weights_only=True)

    assert run("parts", "--until", "4")["step"] == 4
    whole, parts = run("whole"), run("parts")
    assert whole["step"] == parts["step"] == 9
    for name, value in whole["model"].items():
        assert torch.equal(parts["model"][name], value), name
    assert torch.equal(parts["shares"], whole["shares"])
    assert (parts["level"], parts["accuracy"]) == (whole["level"], whole["accuracy"])


def test_biases_move_towards_equal_load_of_both_kinds_of_rows(recipe: Any) -> None:
    model = recipe.model.TinyModel()
    balancer = recipe.train.Balancer(model)
    layers, experts = balancer.shares.shape[1:]
    even, full = torch.full((experts,), 10), torch.full((experts,), 10)
    full[3] = 160
    largest = balancer.update([[[even] * layers, [full] * layers]], frozen=True)
    # of the long rows 160 / 310 go to expert 3, of the short ones 1 / 16; the mean of both is 1 / 16
    assert abs(largest - (160 / 310 + 1 / 16) / 2 * 16) < 1e-5
    assert not any(gate.e_score_correction_bias.any() for gate in balancer.gates)
    balancer.update([[[even] * layers, [full] * layers]], frozen=False)
    for gate in balancer.gates:
        bias = gate.e_score_correction_bias
        assert bias[3] == -recipe.train.BIAS_STEP
        assert (bias[[0, 15]] > 0).all()
