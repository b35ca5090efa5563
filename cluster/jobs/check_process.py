"""A process that checks rows for another: frames of msgpack come on its standard input, and answers go to its output.

frame:    length (4 bytes, little endian) | msgpack
first     CheckSetup; no answer
then      list of InputRow; the answer is a list of CheckedRow of the same length
"""

from __future__ import annotations

import os
import struct
import sys
from typing import Any, BinaryIO

import msgspec

from shoal.parallel.settings import build_settings
from shoal.runtime.request_limits import RequestLimits

from ..engine_args import EngineArgs
from ..prompts import defaults_within
from .check_row import check_row
from .config import InputArgs
from .input.rows import InputRow

HEADER = struct.Struct("<I")


class CheckSetup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The settings that rows are checked with, as plain data."""

    limits: RequestLimits
    engine: dict[str, Any]
    input_args: dict[str, Any]
    sampling: dict[str, Any]
    thinking: bool | None


_SETUP = msgspec.msgpack.Decoder(CheckSetup)
_ROWS = msgspec.msgpack.Decoder(list[InputRow])


def write_frame(file: BinaryIO, message: object) -> None:
    data = msgspec.msgpack.encode(message)
    file.write(HEADER.pack(len(data)) + data)
    file.flush()


def read_frame(file: BinaryIO) -> bytes | None:
    """The msgpack of the next frame; None at the end of the file, also where it cuts a frame off."""
    header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    (length,) = HEADER.unpack(header)
    data = file.read(length)
    return data if len(data) == length else None


def main() -> None:
    """Answer until the input ends, which it does with the other process."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever prints must not be taken for an answer
    first = read_frame(sys.stdin.buffer)
    if first is None:
        return
    setup = _SETUP.decode(first)
    engine = build_settings(EngineArgs, setup.engine)
    defaults = defaults_within(setup.limits, engine, setup.sampling, setup.thinking)
    columns = build_settings(InputArgs, setup.input_args).columns
    while (data := read_frame(sys.stdin.buffer)) is not None:
        write_frame(answers, [check_row(row, columns, defaults) for row in _ROWS.decode(data)])


if __name__ == "__main__":
    main()
