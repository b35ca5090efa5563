"""The stage with the engine, without Ray."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from shoal import LLM, SamplingParams
from shoal.cluster.bundled import BUNDLED_MODEL
from shoal.cluster.data.columns import ERROR_COLUMN
from shoal.cluster.data.config import EngineProcessorConfig
from shoal.cluster.data.rows import row_seed
from shoal.cluster.data.stage import EngineStage
from shoal.cluster.metrics import ray_metrics
from shoal.cluster.metrics.instruments import Labels
from tests.support.stub_engine import RAISES, STUB

DEADLINE_S = 600.0
ENGINE: dict[str, Any] = {"max_num_seqs": 8, "num_threads_per_worker": 1}


def stage(factory: str | None = None, **values: Any) -> EngineStage:
    config = EngineProcessorConfig(model_source=str(BUNDLED_MODEL), engine_kwargs=ENGINE, **values)
    return EngineStage(config, {}) if factory is None else EngineStage(config, {}, factory)


def answers(stage: EngineStage, *batches: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows of every batch, all of which run at the same time."""

    async def one(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row async for table in stage(pa.Table.from_pylist(batch)) for row in table.to_pylist()]

    async def run() -> list[list[dict[str, Any]]]:
        return await asyncio.gather(*map(one, batches))

    return asyncio.run(run())


def question(number: int, **sampling: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"What is {number} + {3 * number}?"}]
    return {"id": number, "messages": messages, "sampling_params": {"max_tokens": 12, **sampling}}


def test_answers_are_those_of_llm() -> None:
    rows = [question(n, temperature=float(n % 2)) for n in range(1, 13)]
    rows[4]["sampling_params"] |= {"seed": 17, "logprobs": 2}
    found = [row for batch in answers(stage(), rows[:4], rows[4:7], rows[7:]) for row in batch]
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    with LLM(**ENGINE) as llm:
        for row, answer in zip(rows, found, strict=True):
            params = dict(row["sampling_params"])
            if params["temperature"]:
                params.setdefault("seed", row_seed(0, answer["prompt_token_ids"]))
            (output,) = llm.chat(row["messages"], SamplingParams(**params))
            (sample,) = output.outputs
            assert answer["prompt_token_ids"] == output.prompt_token_ids
            assert (answer["generated_tokens"], answer["generated_text"]) == (sample.token_ids, sample.text)
            assert answer["num_generated_tokens"] == len(sample.token_ids)
            if "logprobs" not in params:
                assert answer["logprobs"] is None
                continue
            assert sample.logprobs is not None
            assert [{t: e["logprob"] for t, e in position} for position in answer["logprobs"]] == [
                {t: e.logprob for t, e in position.items()} for position in sample.logprobs
            ]
            tokens = "".join(position[0][1]["decoded_token"] for position in answer["logprobs"])
            assert tokens.startswith(answer["generated_text"])


@pytest.mark.parametrize("exports", [True, False])
def test_metrics_go_to_ray_unless_switched_off(exports: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: Counter[str] = Counter()

    class Recorder(ray_metrics.RayInstruments):
        def add(self, name: str, labels: Labels, amount: float) -> None:
            super().add(name, labels, amount)
            assert labels[0] == BUNDLED_MODEL.name
            counted[name] += int(amount)

    monkeypatch.setattr(ray_metrics, "RayInstruments", Recorder)
    rows = [{"tokenized_prompt": [21, 22, 23], "sampling_params": {"max_tokens": 4, "ignore_eos": True}}] * 2
    answers(stage(log_engine_metrics=exports), rows)
    if exports:
        assert (counted["prompt_tokens_total"], counted["generation_tokens_total"]) == (6, 8)
        assert counted["request_success_total"] == 2
    else:
        assert not counted


def test_failed_rows_keep_their_place() -> None:
    rows = [question(1), {"id": 2, "messages": []}, question(3, max_tokens=0), question(4)]
    (found,) = answers(stage(should_continue_on_error=True, max_pending_requests=1), rows)
    assert [row[ERROR_COLUMN].partition(":")[0] for row in found] == ["", "empty_prompt", "invalid_parameter", ""]
    assert [bool(row["generated_tokens"]) for row in found] == [True, False, False, True]
    assert [row["id"] for row in found] == [1, 2, 3, 4]


def test_a_failed_row_ends_the_run_where_it_may_not_continue() -> None:
    with pytest.raises(ValueError, match=r"a row cannot be answered: empty_prompt.*should_continue_on_error=True"):
        answers(stage(), [question(1), {"id": 2, "messages": []}])


def test_special_tokens_in_the_text_of_a_prompt_are_text_and_said(caplog: pytest.LogCaptureFixture) -> None:
    answers(stage(), [{"prompt": "<｜User｜>Hello"}, {"prompt": "Hello"}])
    (record,) = [record for record in caplog.records if record.name == "shoal.data"]
    assert record.getMessage().startswith("1 prompts of a batch have special tokens such as <｜User｜> in their text")


def test_an_engine_that_fails_is_no_failed_row() -> None:
    broken = stage(STUB, should_continue_on_error=True)
    with pytest.raises(RuntimeError, match="the stub broke"):
        answers(broken, [{"tokenized_prompt": [3]}, {"tokenized_prompt": [RAISES]}])
    with pytest.raises(RuntimeError, match="the stub broke"):
        answers(broken, [{"tokenized_prompt": [3]}])


def test_a_batch_that_is_given_up_leaves_nothing_in_the_engine() -> None:
    own = stage()
    long = [question(n, max_tokens=None, ignore_eos=True) for n in range(3)]

    async def run() -> None:
        given_up = asyncio.ensure_future(anext(aiter(own(pa.Table.from_pylist(long)))))
        while own._client is None or own._client.num_requests < len(long):
            await asyncio.sleep(0.001)
        given_up.cancel()
        await asyncio.wait([given_up])
        assert given_up.cancelled()
        assert own._client.num_requests == 0
        async for table in own(pa.Table.from_pylist([question(4)])):
            assert table.num_rows == 1

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    config = EngineProcessorConfig(model_source=str(tmp_path))
    with pytest.raises(ValueError, match=str(tmp_path)):
        EngineStage(config, {})
