"""A request that comes with what an earlier engine generated ends as if this engine had generated all of it."""

from __future__ import annotations

from dataclasses import replace as replace_output
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from shoal.parallel.groups import single_process_groups
from shoal.runtime.engine.build import build_engine
from shoal.runtime.engine.config import EngineConfig
from shoal.runtime.engine.engine import Engine
from shoal.runtime.random_checkpoint import make_checkpoint
from shoal.runtime.response import without_text
from shoal.runtime.tokenization.byte_tokenizer import write_byte_tokenizer
from shoal.runtime.types import (
    Finished,
    GeneratedTokens,
    Prefilled,
    Request,
    RequestOutput,
    SamplingParams,
    Tokens,
)
from tests.support.answers import Answers

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
        return Request(request_id=name, prompt_token_ids=prompt, params=settings)

    return [
        ask("greedy", 3, temperature=0.0, logprobs=3, ignore_eos=True),
        ask("sampled", 40, temperature=1.5, seed=7, n=3, stop_token_ids=list(range(3, 60))),
        ask("penalties", 90, temperature=0.9, seed=8, repetition_penalty=1.3, frequency_penalty=0.5, min_tokens=6),
        ask("stop", 130, temperature=1.2, seed=9, stop=["never met", "x"], ignore_eos=True),
        ask("scored", 170, temperature=0.7, seed=10, n=2, prompt_logprobs=2, logit_bias={5: 4.0}),
        ask("silent", 200, temperature=0.0, logprobs=None),
    ]


def run(engine: Engine, asked: list[Request]) -> tuple[dict[str, RequestOutput], list[list[Tokens]]]:
    """The finished outputs, and the tokens that were new after each step."""
    answers = Answers(asked)
    for one in asked:
        engine.add_request(one)
    reported: list[list[Tokens]] = []
    while engine.has_unfinished:
        outputs = engine.step().outputs
        reported.append(answers.take([*outputs, *engine.take_outputs()]))
        engine.block_manager.check_integrity()
    return answers.finished, reported


def gathered(reported: list[list[Tokens]]) -> Generated:
    """All that was reported, put together as a journal does it."""
    generated: Generated = {}
    for tokens in (t for of_step in reported for t in of_step):
        row = generated.setdefault(tokens.request_id, {})
        before = row.get(tokens.sample_index, GeneratedTokens())
        assert len(before.token_ids) == tokens.start
        logprobs = None if tokens.logprobs is None else without_text(tokens.logprobs)
        row[tokens.sample_index] = before.extended(GeneratedTokens(tokens.token_ids, logprobs))
    return generated


def resumed(asked: list[Request], generated: Generated) -> list[Request]:
    def of(one: Request) -> tuple[GeneratedTokens, ...]:
        row = generated.get(one.request_id, {})
        return tuple(row.get(i, GeneratedTokens()) for i in range(one.params.n))

    return [replace(one, generated=of(one)) for one in asked]


def answers(outputs: dict[str, RequestOutput]) -> dict[str, RequestOutput]:
    return {name: replace_output(output, num_cached_tokens=0) for name, output in outputs.items()}


@pytest.mark.parametrize("settings", [{}, {"max_chunk_size": 5, "enable_prefix_caching": False}, {"num_kv_blocks": 24}])
def test_a_request_goes_on_where_an_earlier_engine_left_it(model_dir: Path, settings: dict[str, Any]) -> None:
    asked = requests()
    expected, reported = run(make_engine(model_dir), asked)
    lengths = {len(c.token_ids) for c in expected["sampled"].outputs}
    assert len(lengths) > 1, "one continuation should end before another"
    for num_steps in (1, 4, 9, len(reported) - 1):
        generated = gathered(reported[:num_steps])
        unfinished = [one for one in asked if any(t.request_id == one.request_id for t in reported[num_steps])]
        again, reported_again = run(make_engine(model_dir, **settings), resumed(unfinished, generated))
        assert answers(again) == {o.request_id: answers(expected)[o.request_id] for o in unfinished}
        first_new = {(t.request_id, t.sample_index): t.start for t in reversed([t for r in reported_again for t in r])}
        for (name, index), start in first_new.items():
            known = generated.get(name, {}).get(index, GeneratedTokens())
            assert start == len(known.token_ids), "tokens that came with a request are not new"


def test_a_request_that_comes_with_its_whole_answer_ends_at_once(model_dir: Path) -> None:
    """The driver has all tokens, and missed only the report of the end."""
    asked = requests()
    expected, reported = run(make_engine(model_dir), asked)
    again, _ = run(make_engine(model_dir), resumed(asked, gathered(reported)))
    assert answers(again) == answers(expected)


def test_reports_make_the_answers(model_dir: Path) -> None:
    asked = requests()
    outputs, reported = run(make_engine(model_dir), asked)
    generated = gathered(reported)
    for one in asked:
        for completion in outputs[one.request_id].outputs:
            found = generated[one.request_id][completion.index]
            assert list(found.token_ids) == completion.token_ids
            if completion.logprobs is not None:
                assert found.logprobs == without_text(completion.logprobs)
    assert generated["silent"][0].logprobs is None


def test_requests_report_at_their_end_what_nobody_took_before(model_dir: Path) -> None:
    engine = make_engine(model_dir)
    (one,) = [r for r in requests() if r.request_id == "greedy"]
    engine.add_request(one)
    reports = []
    while engine.has_unfinished:
        reports.append(engine.step().outputs)
    assert [len(r) for r in reports] == [0] * (MAX_TOKENS - 1) + [3]
    tokens, prefilled, end = reports[-1]
    assert isinstance(tokens, Tokens)
    assert (tokens.start, len(tokens.token_ids)) == (0, MAX_TOKENS)
    assert isinstance(prefilled, Prefilled)
    assert end == Finished(id=one.id, sample_index=0, reason="length", num_tokens=MAX_TOKENS)
