"""Where the rows of an input are checked: in this process, or in several others where that pays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from shoal.runtime.request_limits import RequestLimits

from ..engine_args import EngineArgs
from ..environment import num_cores
from .check_pool import CheckPool
from .check_process import CheckSetup
from .config import InputArgs
from .input.files import InputFile
from .validation import Checker, check_here

MIN_BYTES = 4 << 20
"""Smaller inputs are checked before processes have started."""
MAX_PROCESSES = 16
"""More of them wait for this process, which reads the rows and writes the spool."""


def choose_checker(
    input_args: InputArgs,
    engine: EngineArgs,
    files: Sequence[InputFile],
    *,
    limits: RequestLimits,
    sampling: Mapping[str, Any],
    thinking: bool | None,
) -> Checker:
    """A checker for the rows of some files. The answers are the same, whichever it is.

    limits, sampling, thinking: what `request_defaults` was given or has found.
    """
    num_processes = input_args.num_check_processes
    if num_processes is None:
        is_large = sum(file.num_bytes for file in files) >= MIN_BYTES
        num_processes = min(num_cores(), MAX_PROCESSES) if is_large else 0
    if num_processes == 0:
        return check_here
    setup = CheckSetup(
        limits=limits,
        engine=dataclasses.asdict(engine),
        input_args={field.name: getattr(input_args, field.name) for field in dataclasses.fields(InputArgs)},
        sampling=dict(sampling),
        thinking=thinking,
    )
    return CheckPool(setup, num_processes)
