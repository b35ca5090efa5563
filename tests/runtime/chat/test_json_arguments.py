"""JSON text of arguments that is built up while they are written."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.runtime.chat.json_arguments import JsonObjectWriter, JsonStringScanner, json_type


def never(text: str) -> bool:
    return False


@given(st.dictionaries(st.text(), st.tuples(st.lists(st.text()), st.booleans())))
def test_strings_come_out_as_they_went_in(values: dict[str, tuple[list[str], bool]]) -> None:
    writer = JsonObjectWriter()
    text = ""
    for key, (pieces, is_string) in values.items():
        text += writer.begin_value(key, is_string=is_string)
        for piece in pieces:
            added = writer.write(piece)
            assert json.loads(f'"{added}"') == (piece if is_string else "")
            text += added
        text += writer.end_value(never)
    text += writer.end()
    assert json.loads(text) == {key: "".join(pieces) for key, (pieces, _) in values.items()}


def test_other_values_are_their_text() -> None:
    writer = JsonObjectWriter()
    pieces = [writer.begin_value("a", is_string=False), writer.write("1."), writer.write("50")]
    pieces += [writer.end_value(lambda text: text == "1.50"), writer.end()]
    assert pieces == ['{"a": ', "", "", "1.50", "}"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        *[("1", "integer"), ("-12", "integer"), ("1.0", "number"), ("1e3", "number"), ("2E3", "number")],
        *[("true", "boolean"), ("false", "boolean"), ("null", "null"), ('"e"', "string"), (" [1.5] ", "array")],
        *[('{"a": {}}', "object"), ("", None), (" ", None), ("NaN", None), ("-Infinity", None), ("True", None)],
        *[("1 2", None), ("{", None), ("'a'", None), ("[" * 100_000, None), ("7" * 10_000, "integer")],
    ],
)
def test_json_type(text: str, found: str | None) -> None:
    assert json_type(text) == found


@given(st.recursive(st.text() | st.integers() | st.none(), st.lists), st.data())
def test_the_scanner_knows_where_strings_end(value: object, data: st.DataObject) -> None:
    text = json.dumps(value)
    scanner = JsonStringScanner()
    place = data.draw(st.integers(0, len(text)))
    scanner.scan(text[:place])
    is_open = scanner.is_open
    scanner.scan(text[place:])
    assert not scanner.is_open
    assert is_open == (len(quotes_before(text, place)) % 2 == 1)


def quotes_before(text: str, place: int) -> list[int]:
    """Positions of the quotes before `place` that are not escaped."""
    quotes, i = [], 0
    while i < place:
        if text[i] == '"':
            quotes.append(i)
        i += 2 if text[i] == "\\" else 1
    return quotes
