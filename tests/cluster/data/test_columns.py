"""The columns of answers: their types hold whatever the rows of a block are."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from shoal.cluster.data.columns import (
    ERROR_COLUMN,
    SCHEMA,
    add_columns,
    answered,
    failed,
    read_rows,
    restore_types,
    with_logprobs_by_token,
)
from shoal.cluster.data.rows import RowRequest
from shoal.cluster.openai.errors import ApiError
from shoal.cluster.openai.requests import ParsedRequest
from shoal.runtime.types import CompletionOutput, Logprob, RequestOutput, SamplingParams

BAD = failed(ApiError("empty_prompt", "the prompt is empty"), "x" * 501)


def good(num_logprobs: int | None = None) -> dict[str, Any]:
    parsed = ParsedRequest(
        endpoint="/v1/completions",
        prompt_token_ids=(4, 5),
        params=SamplingParams(logprobs=0, seed=3),
        num_logprobs=num_logprobs,
    )
    sample = CompletionOutput(index=0, text="hi", token_ids=[7], logprobs=[{7: Logprob(-0.5, 2), 8: Logprob(-0.25, 1)}])
    output = RequestOutput(
        request_id="1",
        prompt_token_ids=[4, 5],
        outputs=[sample],
        finished=True,
        prompt_logprobs=None if num_logprobs is None else [None, {5: Logprob(-1.0, 1)}],
        num_cached_tokens=1,
    )
    return answered(RowRequest(parsed, "ab", wants_text=True), output, None, request_id=9, seconds=0.5)


def table(*rows: dict[str, Any]) -> pa.Table:
    return add_columns(pa.table({"id": range(len(rows)), "prompt": [b"old"] * len(rows)}), rows, batch_uuid="ab12")


def test_the_columns_of_an_answer() -> None:
    (row,) = table(good()).to_pylist()
    params = row.pop("params")
    assert "seed=3" in params
    assert "logprobs=None" in params, "what the row asked for"
    assert row == {
        "id": 0,
        "prompt": "ab",
        "prompt_token_ids": [4, 5],
        "num_input_tokens": 2,
        "generated_tokens": [7],
        "generated_text": "hi",
        "num_generated_tokens": 1,
        "logprobs": None,
        "prompt_logprobs": None,
        "metrics": {"num_cached_tokens": 1},
        "request_id": 9,
        "batch_uuid": "ab12",
        "time_taken_llm": 0.5,
        ERROR_COLUMN: "",
    }


def test_logprobs_are_mappings_by_token_id() -> None:
    row = with_logprobs_by_token(table(good(1)).to_pylist()[0])
    assert row["logprobs"] == [
        {
            7: {"logprob": -0.5, "rank": 2, "decoded_token": None},
            8: {"logprob": -0.25, "rank": 1, "decoded_token": None},
        }
    ]
    assert row["prompt_logprobs"] == [None, {5: {"logprob": -1.0, "rank": 1, "decoded_token": None}}]


def test_failed_rows_have_the_same_columns_and_types() -> None:
    assert table(BAD).schema == table(good()).schema == table(good(1), BAD).schema
    assert table(BAD).schema == pa.schema([("id", pa.int64()), *SCHEMA])
    (row,) = table(BAD).to_pylist()
    assert row[ERROR_COLUMN] == "empty_prompt: the prompt is empty"
    assert row["prompt"] == "x" * 500 + "..."
    assert (row["generated_text"], row["generated_tokens"], row["num_generated_tokens"]) == ("", [], 0)
    assert (row["request_id"], row["time_taken_llm"]) == (-1, -1.0)


def test_an_empty_batch_gets_the_columns() -> None:
    empty = pa.table({"id": pa.array([], pa.int64())})
    assert read_rows(empty) == []
    assert add_columns(empty, [], batch_uuid="ab12").schema == table(good()).schema


def test_rows_without_any_column_to_read() -> None:
    assert read_rows(pa.table({"id": [1, 2]})) == [{}, {}]


def test_types_are_restored_where_all_rows_failed() -> None:
    def through_python(block: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([with_logprobs_by_token(row) for row in block.to_pylist()])

    bad, well = through_python(table(BAD)), through_python(table(good()))
    assert bad.schema != well.schema
    assert restore_types(bad).schema == restore_types(well).schema
    assert restore_types(bad).to_pylist() == bad.to_pylist()
    kept = pa.table({"id": [1], "generated_text": ["a"]})
    assert restore_types(kept) == kept
