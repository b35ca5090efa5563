"""The bundled model on one GPU, through the front door: it answers what it has not seen."""

from __future__ import annotations

import pytest

from shoal import LLM, SamplingParams
from shoal.cluster.bundled import questions
from shoal.cluster.commands.eval import final_answer

pytestmark = pytest.mark.gpu


def test_it_answers_what_it_has_not_seen() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=160)
    with LLM(device="cuda") as llm:
        for task in ("addition", "reversing", "lookup"):
            rows = questions([task], limit=20)
            conversations = [[{"role": "user", "content": row.question}] for row in rows]
            outputs = llm.chat(conversations, params, thinking=True)
            again = llm.chat(conversations[:3], params, thinking=True)
            right = sum(final_answer(o) == row.answer for o, row in zip(outputs, rows, strict=True))
            assert right >= 17, (task, right)
            assert [o.outputs[0].token_ids for o in again] == [o.outputs[0].token_ids for o in outputs[:3]]
