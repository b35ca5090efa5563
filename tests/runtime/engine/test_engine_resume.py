"""A request that comes with what an earlier engine generated ends as if this engine had generated all of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.parallel.groups import single_process_groups
from shoal.runtime.engine.build import build_engine
from shoal.runtime.engine.config import EngineConfig
from shoal.runtime.engine.engine import Engine
from shoal.runtime.random_checkpoint import make_checkpoint
from shoal.runtime.tokenization.tokenizer import write_byte_tokenizer
from shoal.runtime.types import GeneratedTokens, Logprob, Request, RequestOutput, RequestProgress, SamplingParams

MAX_TOKENS = 12
Generated = dict[str, dict[int, GeneratedTokens]]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """V3.2 whose sparse selection leaves tokens out from the first one generated on."""
    path = tmp_path_factory.mktemp("model")
    overrides = {"vocab_size": 272, "index_topk": 8}
    make_checkpoint(path, "deepseek_v32", seed=31, dtype=request.param, overrides=overrides)
    write_byte_tokenizer(path / "tokenizer.json")
    return path


def make_engine(model_dir: Path, **settings: Any) -> Engine:
    defaults: dict[str, Any] = {"block_size": 4, "num_kv_blocks": 128, "max_model_len": 96, "max_num_seqs": 8}
    return build_engine(model_dir, EngineConfig(**{**defaults, **settings}), single_process_groups())


def requests() -> list[Request]:
    """Every kind of state that a continuation can have: text held back, penalties, a stop, several, prompt scores."""

    def ask(name: str, first: int, **params: Any) -> Request:
        settings = SamplingParams(**{"max_tokens": MAX_TOKENS, "logprobs": 1, **params})
        prompt = tuple(range(first, first + 18))
        return Request(request_id=name, prompt_token_ids=prompt, params=settings, report_progress=True)

    return [
        ask("greedy", 3, temperature=0.0, logprobs=3, ignore_eos=True),
        ask("sampled", 40, temperature=1.5, seed=7, n=3, stop_token_ids=list(range(3, 60))),
        ask("penalties", 90, temperature=0.9, seed=8, repetition_penalty=1.3, frequency_penalty=0.5, min_tokens=6),
        ask("stop", 130, temperature=1.2, seed=9, stop=["never met", "x"], ignore_eos=True),
        ask("scored", 170, temperature=0.7, seed=10, n=2, prompt_logprobs=2, logit_bias={5: 4.0}),
        ask("silent", 200, temperature=0.0, logprobs=None),
    ]


def run(engine: Engine, asked: list[Request]) -> tuple[dict[str, RequestOutput], list[list[RequestProgress]]]:
    """The finished outputs, and what was reported after each step."""
    for one in asked:
        engine.add_request(one)
    finished: dict[str, RequestOutput] = {}
    reported: list[list[RequestProgress]] = []
    while engine.has_unfinished:
        finished |= {o.request_id: o for o in engine.step().outputs if o.finished}
        reported.append(engine.take_progress())
        engine.block_manager.check_integrity()
    return finished, reported


def gathered(reported: list[list[RequestProgress]]) -> Generated:
    """All that was reported, put together as a journal does it."""
    generated: Generated = {}
    for progress in (p for of_step in reported for p in of_step):
        row = generated.setdefault(progress.request_id, {})
        before = row.get(progress.index, GeneratedTokens())
        assert len(before.token_ids) == progress.start
        row[progress.index] = before.extended(progress.new)
    return generated


def without_text(generated: GeneratedTokens) -> GeneratedTokens:
    """As it comes out of a journal."""
    if generated.logprobs is None:
        return generated
    return GeneratedTokens(
        generated.token_ids,
        tuple({t: Logprob(p.logprob, p.rank) for t, p in position.items()} for position in generated.logprobs),
    )


def resumed(asked: list[Request], generated: Generated) -> list[Request]:
    def of(one: Request) -> tuple[GeneratedTokens, ...]:
        row = generated.get(one.request_id, {})
        return tuple(without_text(row.get(i, GeneratedTokens())) for i in range(one.params.n))

    return [replace(one, generated=of(one)) for one in asked]


def answers(outputs: dict[str, RequestOutput]) -> dict[str, RequestOutput]:
    return {name: replace(output, num_cached_tokens=0) for name, output in outputs.items()}


@pytest.mark.parametrize("settings", [{}, {"max_chunk_size": 5, "enable_prefix_caching": False}, {"num_kv_blocks": 24}])
def test_a_request_goes_on_where_an_earlier_engine_left_it(model_dir: Path, settings: dict[str, Any]) -> None:
    asked = requests()
    expected, reported = run(make_engine(model_dir), asked)
    lengths = {len(c.token_ids) for c in expected["sampled"].outputs}
    assert len(lengths) > 1, "one continuation should end before another"
    for num_steps in (1, 4, 9, len(reported) - 1):
        generated = gathered(reported[:num_steps])
        unfinished = [one for one in asked if any(p.request_id == one.request_id for p in reported[num_steps])]
        again, reported_again = run(make_engine(model_dir, **settings), resumed(unfinished, generated))
        assert answers(again) == {o.request_id: answers(expected)[o.request_id] for o in unfinished}
        first_told = {(p.request_id, p.index): p.start for p in reversed([p for r in reported_again for p in r])}
        for (name, index), start in first_told.items():
            known = generated.get(name, {}).get(index, GeneratedTokens())
            assert start == len(known.token_ids), "what came with a request is not told again"


def test_progress_is_what_the_outputs_have_before_they_finish(model_dir: Path) -> None:
    asked = requests()
    outputs, reported = run(make_engine(model_dir), asked)
    generated = gathered(reported)
    for one in asked:
        completions = outputs[one.request_id].outputs
        assert all(
            completion.token_ids[: len(told.token_ids)] == list(told.token_ids)
            for completion in completions
            if (told := generated[one.request_id].get(completion.index)) is not None
        )
        longest = max(len(c.token_ids) for c in completions)
        assert max(len(g.token_ids) for g in generated[one.request_id].values()) == longest - 1, (
            "the last token of a request comes with its output"
        )
    assert generated["silent"][0].logprobs is None


def test_requests_that_do_not_ask_report_nothing(model_dir: Path) -> None:
    _, reported = run(make_engine(model_dir), [replace(one, report_progress=False) for one in requests()])
    assert not any(reported)
