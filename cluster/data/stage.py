"""The stage of a processor that has the engine: an actor of Ray Data's pool."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa

from ..engine_args import EngineArgs
from ..metrics.export import make_meter
from ..openai.errors import ApiError
from ..openai.responses import failure
from ..prompts import request_defaults
from ..replicas.async_engines import AsyncEngines
from ..replicas.engine_thread import AbortableEngineClient, EngineThread
from ..replicas.open_engines import open_engines
from ..workers.engine_factory import BUILD_ENGINE
from ..workers.own_actor import remove_groups, remove_groups_at_end
from .columns import add_columns, answered, failed, read_rows
from .config import EngineProcessorConfig
from .engine_kwargs import runs_apart
from .rows import RowReader, RowRequest

logger = logging.getLogger("shoal.data")


class EngineStage:
    """Answers batches. Ray Data calls it for several batches at a time, all on one event loop."""

    def __init__(
        self,
        config: EngineProcessorConfig,
        chat_template_kwargs: Mapping[str, Any],
        engine_factory: str = BUILD_ENGINE,
    ) -> None:
        """Start the engine and wait until it is ready. `engine_factory` replaces the engine, for tests."""
        args = config.engine_args
        self._engines = EngineThread(
            lambda: _open_engines(args, engine_factory),
            lambda: make_meter(args, on_ray=config.log_engine_metrics),
        )
        defaults = replace(request_defaults(args, {}, thinking=None), limits=self._engines.limits)
        self._tokenizer = defaults.tokenizer
        self._reader = RowReader(config, defaults, chat_template_kwargs)
        self._keeps_failed_rows = config.should_continue_on_error
        limit = config.max_pending_requests or 0
        self._room = asyncio.Semaphore(limit) if limit > 0 else contextlib.nullcontext()
        self._numbers = itertools.count()
        self._client: AsyncEngines | None = None

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        """The batch with the columns of its answers, its rows in the same order."""
        if self._client is None:
            self._client = AsyncEngines(self._engines)  # on the event loop, which does not run before
        read = await asyncio.to_thread(self._read, batch)
        answers = [asyncio.ensure_future(self._answer(self._client, prompt, one)) for prompt, one in read]
        try:
            rows = await asyncio.gather(*answers)
        finally:
            for answer in answers:
                answer.cancel()
        yield add_columns(batch, rows, batch_uuid=uuid.uuid4().hex)

    def _read(self, batch: pa.Table) -> list[tuple[object, RowRequest | ApiError]]:
        """Every row's prompt as it is in the dataset, and its request or why it has none."""
        read = [(row.get("prompt"), self._read_row(row)) for row in read_rows(batch)]
        requests = [request for _, request in read if isinstance(request, RowRequest)]
        if spelled := [token for one in requests if (token := one.parsed.spelled_token) is not None]:
            logger.warning(
                "%d prompts of a batch have special tokens such as %s in their text; they are encoded as text: give "
                "messages or tokenized_prompt",
                len(spelled),
                spelled[0],
            )
        return read

    def _read_row(self, row: Mapping[str, Any]) -> RowRequest | ApiError:
        try:
            return self._reader.read(row)
        except ApiError as error:
            return self._kept(error)

    async def _answer(self, client: AsyncEngines, prompt: object, request: RowRequest | ApiError) -> dict[str, Any]:
        if isinstance(request, ApiError):
            return failed(request, prompt)
        async with self._room:
            number = next(self._numbers)
            start = time.perf_counter()
            generation = client.generate(request.parsed.to_request("", number))
            try:
                output = await generation.whole()
            finally:
                client.abort(generation)  # if the batch is given up
            seconds = time.perf_counter() - start
        if (error := failure(output)) is not None:
            return failed(self._kept(error), request.prompt)
        return answered(request, output, self._tokenizer, request_id=number, seconds=seconds)

    def _kept(self, error: ApiError) -> ApiError:
        """The error of a row that is kept; raises it where rows are not."""
        if self._keeps_failed_rows:
            return error
        raise ValueError(
            f"a row cannot be answered: {error.code}: {error.message} (should_continue_on_error=True keeps such rows, "
            "with the reason)"
        ) from error


def _open_engines(args: EngineArgs, engine_factory: str) -> AbortableEngineClient:
    if not runs_apart(args):
        return open_engines(args, "inprocess", engine_factory=engine_factory)
    remove_groups()  # of an earlier process of this actor, which was killed
    remove_groups_at_end()
    return open_engines(args, "ray", on_wait=logger.warning, engine_factory=engine_factory)
