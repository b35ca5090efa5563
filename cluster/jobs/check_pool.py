"""Checks rows in several processes; the answers come in the order of the rows.

rows -> chunk 0 -> process 0 -+
        chunk 1 -> process 1 -+-> chunks in order -> answers
        chunk 2 -> process 0 -+
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import BinaryIO, cast

import msgspec

from ..openai.requests import RequestDefaults
from .check_process import CheckSetup, read_frame, write_frame
from .check_row import CheckedRow
from .input.lines import InputLine
from .input.rows import InputRow, JobInput

CHUNK_ROWS = 128
CHUNK_BYTES = 1 << 18
MAX_CHUNKS = 3
"""Chunks that a process has at a time: it works on one, and another is there when it is done."""
ANSWER_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 5.0

_ANSWERS = msgspec.msgpack.Decoder(list[CheckedRow])


class CheckFailed(RuntimeError):  # noqa: N818
    """A process that checks rows ended or did not answer."""


class CheckPool:
    """A `Checker` in processes, which start with every input and end with it."""

    def __init__(self, setup: CheckSetup, num_processes: int) -> None:
        self._setup = setup
        self._num_processes = num_processes

    def __call__(self, job_input: JobInput, defaults: RequestDefaults) -> Iterator[tuple[InputRow, CheckedRow]]:
        """Yield every row and its answer. CheckFailed when a process ends early.

        `defaults` are those that the processes make themselves of their setup.
        """
        with ExitStack() as stack:
            processes = [stack.enter_context(_Process(self._setup)) for _ in range(self._num_processes)]
            waiting: deque[tuple[_Process, list[InputRow]]] = deque()
            for number, chunk in enumerate(_chunks(job_input)):
                process = processes[number % len(processes)]
                process.send(chunk)
                waiting.append((process, chunk))
                if len(waiting) == MAX_CHUNKS * len(processes):
                    yield from _answers(*waiting.popleft())
            while waiting:
                yield from _answers(*waiting.popleft())


def _answers(process: _Process, chunk: list[InputRow]) -> Iterator[tuple[InputRow, CheckedRow]]:
    return zip(chunk, process.receive(), strict=True)


def _chunks(job_input: JobInput) -> Iterator[list[InputRow]]:
    chunk: list[InputRow] = []
    num_bytes = 0
    for row in job_input.rows():
        chunk.append(row)
        num_bytes += len(row.source.data) if isinstance(row.source, InputLine) else CHUNK_BYTES // CHUNK_ROWS
        if len(chunk) == CHUNK_ROWS or num_bytes >= CHUNK_BYTES:
            yield chunk
            chunk = []
            num_bytes = 0
    if chunk:
        yield chunk


class _Process:
    """One process. A thread reads its answers, so that neither waits for the other to read."""

    def __init__(self, setup: CheckSetup) -> None:
        search_path = os.pathsep.join(entry for entry in sys.path if entry)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "shoal.cluster.jobs.check_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,  # Ctrl-C is for the job, which ends it
            env={**os.environ, "PYTHONPATH": search_path, "TOKENIZERS_PARALLELISM": "false"},
        )
        self._answers: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="shoal-check", daemon=True)
        self._reader.start()
        self._send(setup)

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        """End the process, also in the middle of a chunk."""
        self._process.kill()
        self._process.wait(STOP_TIMEOUT_S)
        self._reader.join(STOP_TIMEOUT_S)
        for file in (self._process.stdin, self._process.stdout):
            assert file is not None
            with suppress(BrokenPipeError):  # what was not sent is not needed
                file.close()

    def send(self, rows: list[InputRow]) -> None:
        self._send(rows)

    def receive(self) -> list[CheckedRow]:
        """The answers to the rows that were sent first."""
        try:
            data = self._answers.get(timeout=ANSWER_TIMEOUT_S)
        except queue.Empty as error:
            raise CheckFailed(f"a process that checks rows did not answer in {ANSWER_TIMEOUT_S:g} s") from error
        if data is None:
            raise self._failed()
        return _ANSWERS.decode(data)

    def _send(self, message: object) -> None:
        try:
            write_frame(cast(BinaryIO, self._process.stdin), message)
        except BrokenPipeError as error:
            raise self._failed() from error

    def _failed(self) -> CheckFailed:
        try:
            status = self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return CheckFailed("a process that checks rows has closed its output")
        return CheckFailed(f"a process that checks rows ended with status {status}")

    def _read(self) -> None:
        output = cast(BinaryIO, self._process.stdout)
        while (data := read_frame(output)) is not None:
            self._answers.put(data)
        self._answers.put(None)
