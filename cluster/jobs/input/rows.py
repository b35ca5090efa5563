"""The rows of a job's files, one after the other."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from .bad_row import Place
from .columns import PLAIN_COLUMNS, Columns
from .files import InputFile
from .formats import is_parquet
from .lines import InputLine, parse_line, read_lines
from .parquet import TableRow, plain_value, read_table


@dataclass(frozen=True, slots=True)
class InputRow:
    """A row that is not checked yet."""

    index: int
    """Position among the rows of all files, from 0."""
    file: int
    """Position among the files, from 0."""
    place: Place
    source: InputLine | TableRow

    def values(self, columns: Columns, known: Collection[str]) -> tuple[dict[str, Any], bytes]:
        """The row, and the columns that its answer repeats as JSON text; see `Columns.to_row`. BadRow for no row."""
        if isinstance(self.source, InputLine):
            row, kept = columns.to_row(parse_line(self.source), known, drops_unknown=False)
            return row, json.dumps(kept, ensure_ascii=False).encode() if kept else b""
        row, kept = columns.to_row(self.source.values, known, drops_unknown=True)
        row = {name: plain_value(name, value) for name, value in row.items() if value is not None}
        return row, msgspec.json.encode(kept, enc_hook=str) if kept else b""


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
                    yield InputRow(next(index), number, Place("row", row.number, None, name), row)
                continue
            for line in read_lines(file):
                yield InputRow(next(index), number, Place("line", line.number, line.byte_offset, name), line)
