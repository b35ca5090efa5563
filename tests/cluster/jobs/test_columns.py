"""Rows from the columns of tables and of lines, up to the line of their answer."""

from __future__ import annotations

import datetime
import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shoal.cluster.jobs.config import InputArgs
from shoal.cluster.jobs.input.bad_row import BadRow
from shoal.cluster.jobs.input.columns import PLAIN_COLUMNS, Columns, Template
from shoal.cluster.jobs.input.custom_ids import CustomIdIndex
from shoal.cluster.jobs.rows import BatchRow, read_row
from shoal.cluster.jobs.spool import decode_row
from shoal.cluster.jobs.validation import InputSummary, validate_input
from tests.support.batch_input import first_row, job_input
from tests.support.stub_job import RULES


def write_table(path: Path, rows: list[Any], **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, **options), path, row_group_size=2)
    return path


def values_of(path: Path, columns: Columns = PLAIN_COLUMNS) -> list[tuple[dict[str, Any], Any]]:
    """The rows of a file and what their answers repeat."""
    found = [row.values(columns) for row in job_input(path, columns=columns).rows()]
    return [(row, json.loads(kept) if kept else None) for row, kept in found]


def check(path: Path, columns: Columns = PLAIN_COLUMNS) -> tuple[InputSummary, list[BatchRow], list[dict[str, Any]]]:
    """The counts, the good rows, and the errors of the bad ones."""
    good: list[BatchRow] = []
    bad: list[dict[str, Any]] = []
    ids = CustomIdIndex(path.with_suffix(".sqlite"))
    summary = validate_input(
        job_input(path, columns=columns),
        RULES,
        ids,
        on_good_row=lambda index, payload: good.append(decode_row(index, payload)),
        on_bad_row=lambda row, _error, _source: bad.append(json.loads(row.data)["error"]),
        on_row=lambda _: None,
    )
    ids.close()
    return summary, good, bad


class TestTemplates:
    def test_text_and_columns(self) -> None:
        template = Template("prompt_template", "What is {a} + {b c}? {{braces}} é")
        assert template.render({"a": "1", "b c": 2, "d": None}) == "What is 1 + 2? {braces} é"
        assert Template("system_template", "Be brief.").render({}) == "Be brief."

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            ("{b}", "{b}"),
            (True, "true"),
            (0.5, "0.5"),
            ([1, "é"], '[1,"é"]'),
            ({"x": None}, '{"x":null}'),
            (datetime.date(2026, 11, 30), "2026-11-30"),
            (Decimal("1.50"), "1.50"),
        ],
    )
    def test_values(self, value: Any, text: str) -> None:
        assert Template("prompt_template", "{a}").render({"a": value}) == text

    @pytest.mark.parametrize("values", [{}, {"a": None}, {"a": math.nan}])
    def test_a_value_that_is_missing(self, values: dict[str, Any]) -> None:
        with pytest.raises(BadRow, match="the row has no value in the column a") as error:
            Template("prompt_template", "{a}").render(values)
        assert (error.value.code, error.value.param) == ("missing_column", "a")

    def test_bytes_are_no_text(self) -> None:
        with pytest.raises(BadRow, match="the column a has bytes, which are no text"):
            Template("prompt_template", "{a}").render({"a": b"x"})

    @pytest.mark.parametrize("text", ["{", "}", "{}", "{a.b}", "{a[0]}", "{a!r}", "{a:>5}", "{a", "{0.x}"])
    def test_anything_else_in_braces_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"^prompt_template: "):
            InputArgs(prompt_template=text)

    def test_a_system_message_needs_a_user(self) -> None:
        with pytest.raises(ValueError, match="system_template needs prompt_template"):
            InputArgs(system_template="x")


TEMPLATED = Columns(prompt=Template("prompt_template", "{q}?"), system=Template("system_template", "{style}"))


class TestLines:
    def test_a_template_makes_a_conversation_and_keeps_the_columns(self) -> None:
        row, kept = first_row(b'{"q": "hi", "style": "short", "id": 7, "n": 3, "sampling_params": {"n": 2}}').values(
            TEMPLATED
        )
        assert row == {
            "messages": [{"role": "system", "content": "short"}, {"role": "user", "content": "hi?"}],
            "sampling_params": {"n": 2},
            "id": 7,
        }
        assert json.loads(kept) == {"q": "hi", "style": "short", "n": 3}

    def test_without_one_other_columns_are_mistakes_unless_they_are_named(self) -> None:
        line = b'{"prompt": "x", "source": "web", "key": "k"}'
        row, kept = first_row(line).values(PLAIN_COLUMNS)
        assert (row, kept) == (json.loads(line), b"")
        with pytest.raises(BadRow, match="source is not a known field"):
            read_row(first_row(line), RULES)
        good = read_row(first_row(line), RULES, Columns(keep=["source", "key"], id="key"))
        assert (good.custom_id, json.loads(good.kept)) == ("k", {"source": "web", "key": "k"})

    @pytest.mark.parametrize(("value", "custom_id"), [("7", "7"), ("8.0", "8"), ('"k"', "k")])
    def test_ids_may_be_numbers(self, value: str, custom_id: str) -> None:
        line = f'{{"prompt": "x", "key": {value}}}'.encode()
        assert read_row(first_row(line), RULES, Columns(id="key")).custom_id == custom_id

    def test_an_id_column_that_is_empty_is_a_bad_row(self) -> None:
        with pytest.raises(BadRow, match="the row has no value in the column key"):
            read_row(first_row(b'{"prompt": "x", "key": null}'), RULES, Columns(id="key"))

    def test_columns_with_large_numbers_are_kept(self) -> None:
        columns = Columns(keep=["big"])
        good = read_row(first_row(b'{"prompt": "x", "big": 99999999999999999999}'), RULES, columns)
        assert json.loads(good.kept) == {"big": 99999999999999999999}


class TestTables:
    def test_fields_of_rows_are_columns_and_the_others_are_kept(self, tmp_path: Path) -> None:
        rows = [
            {"id": "a", "prompt": "x", "max_tokens": 4, "source": "web", "stop": ["."]},
            {"id": "b", "prompt": "y", "max_tokens": None, "source": None, "stop": None},
            {"id": "c", "prompt": "z", "max_tokens": 5, "source": "é", "stop": []},
        ]
        path = write_table(tmp_path / "in.parquet", rows)
        assert values_of(path) == [
            ({"id": "a", "prompt": "x", "max_tokens": 4, "stop": ["."]}, {"source": "web"}),
            ({"id": "b", "prompt": "y"}, {"source": None}),
            ({"id": "c", "prompt": "z", "max_tokens": 5, "stop": []}, {"source": "é"}),
        ]
        summary, good, bad = check(path)
        assert (summary.num_rows, [row.custom_id for row in good], bad) == (3, ["a", "b", "c"], [])
        assert good[0].parsed.params.stop == (".",)

    def test_conversations_lose_what_is_missing_in_them(self, tmp_path: Path) -> None:
        message = {"role": "user", "content": "hi", "name": None, "tool_calls": None}
        sampling = {"temperature": 0.5, "top_p": None}
        path = write_table(tmp_path / "in.parquet", [{"messages": [message], "sampling_params": sampling}])
        assert values_of(path) == [
            ({"messages": [{"role": "user", "content": "hi"}], "sampling_params": {"temperature": 0.5}}, None)
        ]
        _, good, bad = check(path)
        assert (good[0].parsed.params.temperature, bad) == (0.5, [])

    def test_openais_lines_as_a_table(self, tmp_path: Path) -> None:
        body = {"prompt": "x", "max_tokens": 3}
        rows = [{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}]
        _, good, bad = check(write_table(tmp_path / "in.parquet", rows))
        assert (good[0].custom_id, good[0].parsed.params.max_tokens, bad) == ("a", 3, [])

    def test_bad_rows_name_their_place(self, tmp_path: Path) -> None:
        rows = [
            {"id": "a", "prompt": "x", "temperature": 0.5},
            {"id": "a", "prompt": "y", "temperature": 0.5},
            {"id": "b", "prompt": None, "temperature": 0.5},
            {"id": "c", "prompt": "z", "temperature": math.nan},
            {"id": "d", "prompt": "z", "temperature": -1.0},
        ]
        summary, good, bad = check(write_table(tmp_path / "in.parquet", rows))
        assert (summary.num_rows, summary.num_bad_rows, len(good)) == (5, 4, 1)
        assert [(error["row"], error["code"]) for error in bad] == [
            (2, "duplicate_custom_id"),
            (3, "missing_prompt"),
            (4, "non_finite_number"),
            (5, "invalid_parameter"),
        ]
        assert bad[0]["message"] == "row 2 repeats the custom_id 'a' of row 1"
        assert "byte_offset" not in bad[0]

    def test_a_value_that_json_lacks_is_a_bad_row_where_it_is_read_and_text_where_it_is_kept(
        self, tmp_path: Path
    ) -> None:
        when = datetime.datetime(2026, 11, 30, 12, tzinfo=datetime.UTC)
        rows = [{"prompt": "x", "at": when, "price": Decimal("1.5"), "raw": b"\xff", "x": math.nan}]
        ((row, kept),) = values_of(write_table(tmp_path / "in.parquet", rows))
        assert row == {"prompt": "x"}
        assert (kept["price"], kept["raw"], kept["x"]) == ("1.5", "/w==", None)
        assert kept["at"].startswith("2026-11-30T12:00:00")
        _, good, bad = check(write_table(tmp_path / "bad.parquet", [{"prompt": when}]))
        assert (good, bad[0]["message"]) == ([], "the column prompt has a value of the type datetime")

    def test_templates(self, tmp_path: Path) -> None:
        rows = [{"q": "hi", "style": "short", "id": 7, "prompt": "unused"}, {"q": None, "style": "s", "id": 8}]
        path = write_table(tmp_path / "in.parquet", rows)
        row, kept = values_of(write_table(tmp_path / "one.parquet", rows[:1]), TEMPLATED)[0]
        assert row["messages"][1] == {"role": "user", "content": "hi?"}
        assert kept == {"q": "hi", "style": "short", "prompt": "unused"}
        summary, _, bad = check(path, TEMPLATED)
        assert (summary.num_rows, bad[0]["code"], bad[0]["message"]) == (
            2,
            "missing_column",
            "the row has no value in the column q",
        )

    def test_a_damaged_table_is_refused(self, tmp_path: Path) -> None:
        path = write_table(tmp_path / "in.parquet", [{"prompt": "x" * 100}] * 50)
        path.write_bytes(path.read_bytes()[:-30])
        with pytest.raises(ValueError, match=r"in\.parquet cannot be read after row 0"):
            values_of(path)

    def test_many_rows_are_read_a_few_at_a_time(self, tmp_path: Path) -> None:
        path = write_table(tmp_path / "in.parquet", [{"prompt": str(i)} for i in range(1000)])
        assert [row["prompt"] for row, _ in values_of(path)] == [str(i) for i in range(1000)]
