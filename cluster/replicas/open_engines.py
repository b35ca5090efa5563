"""Where the engines of a process run: in it, or in workers of their own on Ray."""

from __future__ import annotations

from collections.abc import Callable

from ..engine_args import EngineArgs, Executor
from ..workers.engine_factory import BUILD_ENGINE
from ..workers.spec import OnPhase
from .engine_thread import AbortableEngineClient
from .inprocess import InProcessEngine


def choose_executor(args: EngineArgs) -> Executor:
    """Where engines run if nobody says: on Ray for more than one worker or a given Ray, else in this process."""
    return "ray" if args.num_workers > 1 or args.ray_address is not None else "inprocess"


def open_engines(
    args: EngineArgs,
    executor: Executor,
    *,
    on_phase: OnPhase | None = None,
    on_wait: Callable[[str], None] | None = None,
    engine_factory: str = BUILD_ENGINE,
) -> AbortableEngineClient:
    """Start the engines and wait until they can serve. The parameters are those of `start_engines`.

    `executor` "auto" is what `choose_executor` says.
    """
    if executor == "auto":
        executor = choose_executor(args)
    if executor == "inprocess":
        return InProcessEngine(args, on_phase=on_phase, engine_factory=engine_factory)
    from .start import start_engines  # with Ray, which one process does not need

    return start_engines(args, on_phase=on_phase, on_wait=on_wait, engine_factory=engine_factory)
