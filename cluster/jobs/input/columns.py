"""Columns of an input to the row that is asked: templates of messages, the column of ids, and what is carried along."""

from __future__ import annotations

import math
import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from shoal.parallel.settings import SettingError
from shoal.runtime.plain_numbers import whole_number

from .bad_row import BadRow

ID_COLUMNS = ("custom_id", "id")
"""Where rows have their ids if no column is named."""


class Template:
    """A text with the names of columns in braces; {{ and }} are braces."""

    def __init__(self, setting: str, text: str) -> None:
        """`setting` is what messages call the template. SettingError for anything else in braces."""
        try:
            pieces = list(string.Formatter().parse(text))
        except ValueError as error:
            raise SettingError(setting, f"{setting}: {error}; write {{{{ and }}}} for braces") from error
        for _, name, form, conversion in pieces:
            if name is not None and (not name or form or conversion or not set("[].").isdisjoint(name)):
                raise SettingError(setting, f"{setting}: {{{name}}} is not the name of a column alone")
        self._pieces = [(literal, name) for literal, name, _, _ in pieces]

    def render(self, values: Mapping[str, Any]) -> str:
        """The text of a row. BadRow for a column that it lacks."""
        return "".join(
            literal + ("" if name is None else _text_of(name, values.get(name))) for literal, name in self._pieces
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """How the columns of an input are read."""

    prompt: Template | None = None
    """The message of the user; None: rows have their own prompt or messages."""
    system: Template | None = None
    """The message of the system before it."""
    id: str | None = None
    """The column of the custom ids; None: one of ID_COLUMNS, if there."""
    keep: Sequence[str] | None = None
    """Columns that answers repeat; None: with a template, or from a table, all that are no fields of the row."""

    def to_row(
        self, values: Mapping[str, Any], known: Collection[str], *, drops_unknown: bool
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The row without its columns that are no fields of it, and the columns that its answer repeats.

        `known` are the fields of a row. `drops_unknown`: whether other columns are expected, and no fields that are
        misspelt. BadRow for a column that is missing.
        """
        if self.prompt is not None:
            row = {"messages": self._messages(values), "sampling_params": values.get("sampling_params")}
        else:
            kept = set() if self.keep is None else set(self.keep)
            kept |= {self.id} if self.id is not None else set()
            kept |= values.keys() if drops_unknown else set()
            row = {name: value for name, value in values.items() if name in known or name not in kept}
        row |= self._custom_id(values)
        if self.keep is not None:
            return row, {name: values.get(name) for name in self.keep}
        if self.prompt is None and not drops_unknown:
            return row, {}
        return row, {name: value for name, value in values.items() if name not in {*row, self.id, *ID_COLUMNS}}

    def _messages(self, values: Mapping[str, Any]) -> list[dict[str, str]]:
        assert self.prompt is not None
        messages = [] if self.system is None else [{"role": "system", "content": self.system.render(values)}]
        return [*messages, {"role": "user", "content": self.prompt.render(values)}]

    def _custom_id(self, values: Mapping[str, Any]) -> dict[str, Any]:
        if self.id is None:
            return {name: values[name] for name in ID_COLUMNS if values.get(name) is not None}
        value = values.get(self.id)
        if value is None:
            raise _missing(self.id)
        return {"custom_id": value if (number := whole_number(value)) is None else str(number)}


PLAIN_COLUMNS = Columns()
"""Those of rows in their own form."""


def _text_of(column: str, value: Any) -> str:
    if value is None:
        raise _missing(column)
    if isinstance(value, str):
        return value
    if isinstance(value, float) and math.isnan(value):  # what pandas writes for nothing
        raise _missing(column)
    if isinstance(value, bytes):
        raise BadRow("invalid_type", f"the column {column} has bytes, which are no text", column)
    if isinstance(value, bool | int | float | list | Mapping):
        return msgspec.json.encode(value).decode()
    return str(value)


def _missing(column: str) -> BadRow:
    return BadRow("missing_column", f"the row has no value in the column {column}", column)
