"""The engine as the loop around it sees it, and how one is built inside a worker."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection
from importlib import import_module
from typing import Protocol, runtime_checkable

from shoal.parallel.groups import ParallelGroups
from shoal.parallel.kv_transport import KVChunk, KVTransport
from shoal.parallel.request_id import RequestId
from shoal.parallel.spans import Spans
from shoal.runtime.engine.stats import EngineStats
from shoal.runtime.engine.step_profile import StepProfile
from shoal.runtime.request_limits import RequestLimits
from shoal.runtime.response import refusal
from shoal.runtime.types import EngineOutput, Finished, GeneratedTokens, PromptLoaded, Request

from ..engine_args import EngineArgs
from .spec import StartReport

BUILD_ENGINE = "shoal.cluster.workers.engine_factory:build_engine"
BUILD_PROFILED_ENGINE = "shoal.cluster.workers.engine_factory:build_profiled_engine"
"""Builds an engine that is `Profiled`."""


class StepResult(Protocol):
    """What a step says to the loop around it."""

    @property
    def outputs(self) -> list[EngineOutput]: ...
    @property
    def idle(self) -> bool: ...
    @property
    def stopped(self) -> bool: ...
    @property
    def woke(self) -> bool: ...
    @property
    def chunks(self) -> list[KVChunk]: ...
    @property
    def loaded(self) -> list[PromptLoaded]: ...


class EngineLike(Protocol):
    """The engine as its loop sees it. All ranks of a replica call `step` together and see `stopped` in the same one."""

    @property
    def limits(self) -> RequestLimits: ...
    def has_request(self, request_id: RequestId) -> bool: ...
    def add_request(self, request: Request) -> None: ...
    def abort(self, request_id: RequestId) -> None: ...
    def add_chunk(self, chunk: KVChunk) -> None: ...
    def end_prefill(self, request_id: RequestId, generated: tuple[GeneratedTokens, ...] | None) -> None: ...
    def take_outputs(self) -> list[EngineOutput]: ...
    def rejoin(self, replaced: Collection[int]) -> None: ...
    def step(self) -> StepResult: ...
    def request_stop(self) -> None: ...
    def audit(self) -> list[str]: ...
    def stats(self) -> EngineStats: ...


@runtime_checkable
class Profiled(Protocol):
    """An engine with spans that a phase timer may watch."""

    @property
    def spans(self) -> Spans: ...


def step_profile(engine: EngineLike) -> StepProfile:
    """What the phase timer of a profiled engine measured."""
    from shoal.runtime.engine.step_profile import profile_of

    assert isinstance(engine, Profiled)
    return profile_of(engine.spans)


EngineFactory = Callable[[EngineArgs, ParallelGroups, StartReport, KVTransport | None], EngineLike]


def build_engine(
    args: EngineArgs, groups: ParallelGroups, report: StartReport, transport: KVTransport | None
) -> EngineLike:
    """Load this rank's part of the model; reports the seconds."""
    from shoal.runtime.engine import build  # here, so that a stub needs no model code

    prepare(args, report)
    start = time.monotonic()
    engine = build.build_engine(
        args.model, args.to_engine_config(), groups, transport=transport, on_phase=report.notices.append
    )
    report.phases["weights"] = time.monotonic() - start
    report.num_kv_blocks = engine.block_manager.num_blocks
    report.num_kv_tokens = engine.block_manager.num_blocks * engine.block_manager.block_size
    _freeze_heap()
    return engine


def build_profiled_engine(
    args: EngineArgs, groups: ParallelGroups, report: StartReport, transport: KVTransport | None
) -> EngineLike:
    """`build_engine`, with a timer of the phases of its steps."""
    from shoal.runtime.engine.step_profile import add_phase_timer

    add_phase_timer(groups.spans, groups.device)
    return build_engine(args, groups, report, transport)


def prepare(args: EngineArgs, report: StartReport) -> None:
    """What needs no rank: model code and kernels."""
    import shoal.runtime.engine.build
    from shoal.kernels.build import load_library

    assert shoal.runtime.engine.build
    if args.device == "cpu" and args.kernel_backend in ("auto", "cpu"):
        start = time.monotonic()
        load_library()  # compiled once per machine
        report.phases["kernels"] = time.monotonic() - start
    _freeze_heap()  # now, so that a spare that takes a rank does not look at all modules


def _freeze_heap() -> None:
    """Take what is there out of garbage collection: it stays, and a collection between two steps takes long."""
    gc.collect()
    gc.freeze()


def admit(engine: EngineLike, request: Request) -> list[Finished]:
    """Add a request; returns its end, with finish reason "error", when the engine refuses it."""
    try:
        engine.add_request(request)
    except ValueError as error:
        return refusal(request, str(error))
    return []


def resolve_factory(path: str) -> EngineFactory:
    """The function that `module:function` names."""
    module, _, name = path.partition(":")
    factory: EngineFactory = getattr(import_module(module), name)
    return factory
