"""Rows of a Parquet file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .bad_row import BadRow
from .files import InputFile

BATCH_ROWS = 256
"""Rows that are in memory at a time."""


@dataclass(frozen=True, slots=True)
class TableRow:
    """A row of a table."""

    number: int
    """Position among the rows of its file, from 1."""
    values: Mapping[str, Any]
    """Values by column, None where there is none."""


def read_table(file: InputFile) -> Iterator[TableRow]:
    """Yield the rows of a Parquet file in order. ValueError if it cannot be read to its end."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError(f"reading {file.url} needs pyarrow: pip install 'shoal[data]'") from error
    number = 0
    try:
        with file.open_whole() as opened, pq.ParquetFile(opened) as table:
            names = table.schema_arrow.names
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{file.url} has the column {repeated[0]} twice")
            for batch in table.iter_batches(BATCH_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield TableRow(number, values)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file.url} cannot be read after row {number}: {error}") from error


def plain_value(column: str, value: Any) -> Any:
    """A value of a table as JSON would have it, without what is missing in it. BadRow for one that JSON lacks."""
    if isinstance(value, Mapping):
        return {name: plain_value(column, one) for name, one in value.items() if one is not None}
    if isinstance(value, list | tuple):  # a map is a list of pairs
        return [plain_value(column, one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow("non_finite_number", f"the column {column} has {value}, which is not a JSON number", column)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise BadRow("invalid_type", f"the column {column} has a value of the type {type(value).__name__}", column)
