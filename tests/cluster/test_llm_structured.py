"""Structured outputs through `LLM`, on the bundled model."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from shoal import LLM, SamplingParams, StructuredOutputsParams

SUM = {
    "type": "object",
    "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 999}, "even": {"type": "boolean"}},
    "required": ["sum", "even"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    threads = torch.get_num_threads()
    with LLM(num_threads_per_worker=1) as llm:
        yield llm
    torch.set_num_threads(threads)


def params(form: StructuredOutputsParams, **values: object) -> SamplingParams:
    return SamplingParams.from_dict(
        {"max_tokens": 200, "temperature": 1.2, "seed": 5, **values, "structured_outputs": form}
    )


def test_prompts_have_forms_of_their_own(llm: LLM) -> None:
    forms = [
        StructuredOutputsParams(json=SUM),
        StructuredOutputsParams(choice=["one", "two"]),
        StructuredOutputsParams(regex="[xyz]{5}"),
    ]
    outputs = llm.generate(["a", "b", "c"], [params(form, n=2) for form in forms])
    for answer in outputs[0].outputs:
        value = json.loads(answer.text)
        assert isinstance(value["even"], bool)
        assert 0 <= value["sum"] <= 999
    assert all(answer.text in ("one", "two") for answer in outputs[1].outputs)
    assert all(len(answer.text) == 5 and set(answer.text) <= set("xyz") for answer in outputs[2].outputs)
    assert {answer.finish_reason for output in outputs for answer in output.outputs} == {"stop"}


def test_the_content_of_a_chat_has_the_form_and_the_reasoning_has_not(llm: LLM) -> None:
    question = [{"role": "user", "content": "What is 2 + 2?"}]
    form = params(StructuredOutputsParams(json=SUM), temperature=0.0)
    for thinking in (False, True):
        [output] = llm.chat(question, form, thinking=thinking)
        answer = output.outputs[0]
        assert answer.finish_reason == "stop"
        assert answer.message is not None
        assert json.loads(answer.message["content"]).keys() == {"sum", "even"}
        assert bool(answer.message.get("reasoning_content")) is thinking


def test_a_form_that_cannot_be_enforced_is_refused_before_anything_runs(llm: LLM) -> None:
    good, bad = params(StructuredOutputsParams(choice=["a"])), params(StructuredOutputsParams(json={"contains": {}}))
    with pytest.raises(ValueError, match=r"prompt 1: structured_outputs\.json: Unimplemented keys: \[\"contains\"\]"):
        llm.generate(["x", "y"], [good, bad])
