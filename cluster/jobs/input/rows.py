"""The rows of a job's files, one after the other."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ..row_fields import ROW_FIELDS
from .bad_row import BadRow, Place
from .columns import PLAIN_COLUMNS, Columns
from .files import InputFile
from .formats import is_parquet
from .lines import InputLine, parse_line, read_lines
from .parquet import TableRow, plain_value, read_table


class TableValues(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=2):
    """A row of a table as JSON has it."""

    row: dict[str, Any]
    kept: bytes = b""
    """Columns that its answer repeats, as the text of a JSON object; empty for none."""
    error: tuple[str, str, str | None] | None = None
    """Why it is no row: code, message, column."""


class InputRow(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A row that is not checked yet."""

    index: int
    """Position among the rows of all files, from 0."""
    file: int
    """Position among the files, from 0."""
    place: Place
    source: InputLine | TableValues

    def values(self, columns: Columns) -> tuple[dict[str, Any], bytes]:
        """The row, and the columns that its answer repeats as JSON text; see `Columns.to_row`. BadRow for no row."""
        if isinstance(self.source, InputLine):
            row, kept = columns.to_row(parse_line(self.source), ROW_FIELDS, drops_unknown=False)
            return row, json.dumps(kept, ensure_ascii=False).encode() if kept else b""
        if self.source.error is not None:
            raise BadRow(*self.source.error)
        return self.source.row, self.source.kept


@dataclass(frozen=True, kw_only=True, slots=True)
class JobInput:
    """What a job reads."""

    files: Sequence[InputFile]
    columns: Columns = PLAIN_COLUMNS
    limit: int | None = None
    """Rows that are read; None: all."""

    def rows(self) -> Iterator[InputRow]:
        """The rows in order. ValueError for a file of another format and for one that cannot be read to its end."""
        return itertools.islice(self._all_rows(), self.limit)

    def place(self, file: int, number: int) -> Place:
        """Where row `number` of a file is, without its offset."""
        name = self.files[file].url if len(self.files) > 1 else None
        return Place("row" if is_parquet(self.files[file]) else "line", number, None, name)

    def _all_rows(self) -> Iterator[InputRow]:
        index = itertools.count()
        for number, file in enumerate(self.files):
            name = file.url if len(self.files) > 1 else None
            if is_parquet(file):
                for row in read_table(file):
                    place = Place("row", row.number, None, name)
                    yield InputRow(next(index), number, place, _table_values(row, self.columns))
                continue
            for line in read_lines(file):
                yield InputRow(next(index), number, Place("line", line.number, line.byte_offset, name), line)


def _table_values(row: TableRow, columns: Columns) -> TableValues:
    try:
        own, kept = columns.to_row(row.values, ROW_FIELDS, drops_unknown=True)
        own = {name: plain_value(name, value) for name, value in own.items() if value is not None}
    except BadRow as error:
        return TableValues({}, error=(error.code, error.message, error.param))
    return TableValues(own, msgspec.json.encode(kept, enc_hook=str) if kept else b"")
