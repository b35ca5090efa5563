"""Structured outputs in an engine: answers have their form, whatever the schedule, the layout and the history."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from msgspec.structs import replace

from shoal.parallel.groups import single_process_groups
from shoal.runtime.engine.build import build_engine
from shoal.runtime.engine.config import EngineConfig
from shoal.runtime.engine.engine import Engine
from shoal.runtime.random_checkpoint import make_checkpoint
from shoal.runtime.tokenization.tokenizer import THINK_END, Tokenizer
from shoal.runtime.types import GeneratedTokens, Request, RequestOutput, SamplingParams
from tests.support.answers import Answers
from tests.support.invariance import SCHEDULES, Point, bits, differing, make_model, run_point, run_points_on_rank
from tests.support.roles import Roles, run_roles
from tests.support.spawn import run_ranks

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog", "horse"]},
        "legs": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 2}, "maxItems": 2},
    },
    "required": ["kind", "legs", "tags"],
    "additionalProperties": False,
}
FORMS: list[dict[str, Any]] = [
    {"json": SCHEMA},
    {"regex": "[a-f]{3,9}(-[0-9]{2}){2}"},
    {"choice": ["left", "leftmost", "right"]},
    {"grammar": 'start: sum\nsum: NUMBER ("+" NUMBER){1,3}\nNUMBER: /[1-9][0-9]?/'},
]
MAX_TOKENS = 80
"""Enough for the longest answer of each form: a row that does not finish would prove less."""


def asked(vocab_size: int) -> list[Request]:
    """Each form greedily and sampled, after some reasoning, with penalties, several times, and a row without a form."""
    cases: list[tuple[dict[str, Any] | None, dict[str, Any]]] = [
        (FORMS[0], {"temperature": 0.0, "logprobs": 2}),
        (FORMS[0], {"temperature": 1.3, "n": 3, "logprobs": 0}),
        (FORMS[1], {"temperature": 1.0, "top_p": 0.9, "logprobs": 1}),
        (FORMS[2], {"temperature": 1.0, "n": 2, "min_tokens": 6}),
        (FORMS[3], {"temperature": 0.8, "top_k": 30, "repetition_penalty": 1.2, "logprobs": 0}),
        (None, {"temperature": 1.0, "max_tokens": 12, "logprobs": 1}),
    ]
    return [
        Request(
            request_id=str(i),
            index=i,
            prompt_token_ids=tuple(3 + (11 * i + 5 * j) % 250 for j in range(1 + 9 * i)),
            params=SamplingParams.from_dict({"max_tokens": MAX_TOKENS, "structured_outputs": form, **params}),
        )
        for i, (form, params) in enumerate(cases)
    ]


def has_form(form: dict[str, Any], text: str) -> bool:
    if "json" in form:
        jsonschema.validate(json.loads(text), form["json"])
        return True
    if "choice" in form:
        return text in form["choice"]
    pattern = form.get("regex", r"[1-9][0-9]?(\+[1-9][0-9]?){1,3}")
    return re.fullmatch(pattern, text) is not None


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_checkpoint(path, "deepseek_v32", seed=41, dtype=torch.float32, overrides={"vocab_size": 288, "index_topk": 8})
    return path


def make_engine(model_dir: Path, **settings: Any) -> Engine:
    defaults: dict[str, Any] = {"block_size": 4, "num_kv_blocks": 256, "max_model_len": 256, "max_num_seqs": 8}
    return build_engine(model_dir, EngineConfig(**{**defaults, **settings}), single_process_groups())


def run(engine: Engine, *requests: Request) -> dict[str, RequestOutput]:
    answers = Answers(requests)
    for request in requests:
        engine.add_request(request)
    for _ in range(2000):
        if not engine.has_unfinished:
            return answers.finished
        answers.take(engine.step().outputs)
    raise AssertionError("the engine does not finish")


def test_a_weak_model_gives_answers_of_every_form(model_dir: Path) -> None:
    requests = asked(288)
    outputs = run(make_engine(model_dir), *requests)
    for request in requests:
        form = request.params.structured_outputs
        for sample in outputs[request.request_id].outputs:
            assert sample.error is None
            if form is None:
                continue
            assert sample.finish_reason == "stop"
            assert sample.stop_reason is None
            assert sample.token_ids[-1] == 1
            assert has_form({form.kind: SCHEMA if form.kind == "json" else getattr(form, form.kind)}, sample.text)
    several = [o.text for o in outputs["1"].outputs]
    assert len(set(several)) == 3, "each sample goes its own way"


def test_a_row_does_not_depend_on_its_company(model_dir: Path) -> None:
    requests = asked(288)
    together = run(make_engine(model_dir), *requests)
    for request in requests:
        alone = run(make_engine(model_dir, max_chunk_size=3, max_num_batched_tokens=16), request)
        assert bits(alone[request.request_id]) == bits(together[request.request_id])


@pytest.mark.parametrize("given", [1, 2, 5, 11])
def test_a_request_goes_on_from_what_was_generated(model_dir: Path, given: int) -> None:
    requests = asked(288)
    whole = run(make_engine(model_dir), *requests)
    resumed = []
    for request in requests:
        generated = tuple(
            GeneratedTokens(tuple(o.token_ids), None if o.logprobs is None else tuple(o.logprobs)).head(given)
            for o in whole[request.request_id].outputs
        )
        resumed.append(replace(request, generated=generated))
    again = run(make_engine(model_dir), *resumed)
    for name, output in again.items():
        assert [o.token_ids for o in output.outputs] == [o.token_ids for o in whole[name].outputs]


def test_the_form_follows_the_reasoning(model_dir: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(model_dir)
    assert tokenizer is not None
    end = tokenizer.special_id(THINK_END)
    assert end is not None
    requests = [
        Request(
            request_id=str(seed),
            index=seed,
            prompt_token_ids=(7, 8, 9),
            reasoning_end_token_id=end,
            params=SamplingParams.from_dict(
                {
                    "max_tokens": 60,
                    "temperature": 1.5,
                    "seed": seed,
                    "logit_bias": {end: 6.0, 1: 8.0},
                    "structured_outputs": FORMS[2],
                }
            ),
        )
        for seed in range(12)
    ]
    outputs = run(make_engine(model_dir), *requests)
    lengths = set()
    for output in outputs.values():
        sample = output.outputs[0]
        reasoning = sample.token_ids.index(end)
        lengths.add(reasoning)
        assert 1 not in sample.token_ids[:reasoning], "no answer ends before its form"
        answer = tokenizer.decode(sample.token_ids[reasoning + 1 : -1])
        assert answer in FORMS[2]["choice"]
        assert sample.finish_reason == "stop"
    assert len(lengths) > 2


def test_stop_tokens_of_a_request_end_the_answer_where_the_form_does(model_dir: Path) -> None:
    """They stand for the tokens that end a turn of a chat format."""
    turn_end = 287
    params = {
        "temperature": 0.0,
        "max_tokens": 30,
        "stop_token_ids": [turn_end],
        "logit_bias": {turn_end: 100.0},
        "structured_outputs": {"regex": "[a-c]{4,20}"},
    }
    request = Request(request_id="a", prompt_token_ids=(5, 6), params=SamplingParams.from_dict(params))
    sample = run(make_engine(model_dir), request)["a"].outputs[0]
    assert (len(sample.text), sample.token_ids[-1], sample.stop_reason) == (4, turn_end, turn_end)


def test_min_tokens_end_before_the_form_does(model_dir: Path) -> None:
    params = {"temperature": 1.0, "max_tokens": 30, "min_tokens": 25, "structured_outputs": {"choice": ["abc"]}}
    request = Request(request_id="a", prompt_token_ids=(5, 6), params=SamplingParams.from_dict(params))
    sample = run(make_engine(model_dir), request)["a"].outputs[0]
    assert (sample.text, sample.finish_reason, len(sample.token_ids)) == ("abc", "stop", 4)


def test_a_bad_form_is_refused_and_a_limit_is_that_rows_error(model_dir: Path) -> None:
    engine = make_engine(model_dir)
    bad = SamplingParams.from_dict({"structured_outputs": {"json": {"not": {}}}})
    with pytest.raises(ValueError, match=r"structured_outputs\.json: Unimplemented keys"):
        engine.add_request(Request(request_id="bad", prompt_token_ids=(5,), params=bad))
    assert not engine.has_unfinished
    heavy = {"max_tokens": 150, "temperature": 0.0, "structured_outputs": {"regex": "(.*a.{1,200}){1,20}"}}
    bias = {"logit_bias": {3 + ord("a"): 100.0}}
    requests = [
        Request(request_id="0", prompt_token_ids=(5, 6), params=SamplingParams.from_dict({**heavy, **bias})),
        *(replace(r, request_id=str(i + 1), index=0) for i, r in enumerate(asked(288)[2:4])),
    ]
    outputs = run(engine, *requests)
    failed = outputs["0"].outputs[0]
    assert failed.finish_reason == "error"
    assert failed.error is not None
    assert "too many expressions" in failed.error
    assert [outputs[name].outputs[0].finish_reason for name in ("1", "2")] == ["stop", "stop"]
    assert engine.audit() == []


POINTS = [
    Point("tp 2", tp=2, engine={"max_chunk_size": 7}, preempt_every=3, order="reversed"),
    Point("dp 2", dp=2, engine={"max_num_batched_tokens": 8}, resume_after=9),
    Point("tp 2 x dp 2", tp=2, dp=2),
]


@pytest.mark.slow
def test_answers_do_not_depend_on_schedule_layout_or_roles(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path, "deepseek_v32", "float32")
    expected = run_point(Point("reference"), model_dir, "float32", single_process_groups(), asked)
    assert len(expected) == len(asked(0))
    wrong: dict[str, list[int]] = {}
    for name, how in SCHEDULES.items():
        rows = run_point(Point(name, **how), model_dir, "float32", single_process_groups(), asked)
        wrong[name] = differing(rows, expected)
    per_rank = run_ranks(run_points_on_rank, 4, [(model_dir, "float32")], POINTS, "cpu", asked, timeout_s=900.0)
    for number, point in enumerate(POINTS):
        rows = {row: value for rank in per_rank for row, value in rank[0][number].items()}
        wrong[point.name] = differing(rows, expected)
    assert {name: rows for name, rows in wrong.items() if rows} == {}

    requests = [replace(r, params=replace(r.params, seed=100 + r.index)) for r in asked(0)]
    alone = run(make_engine(model_dir, max_model_len=128), *requests)
    split = run_roles(Roles(("prefill:1", "decode:1")), model_dir, "float32", requests)
    assert split == [bits(alone[r.request_id]) for r in requests]
