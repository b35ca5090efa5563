"""Named spans of a step, for listeners: profilers, phase timers, failpoints.

    with spans("engine.run"):
        logits = ...

The code names its spans once; listeners are added where an engine is built. A span without listeners costs one
dictionary lookup.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Literal, Protocol, get_args

SpanName = Literal[
    "engine.step",
    "engine.schedule",
    "engine.agree",  # the collective in which ranks agree on a step
    "engine.run",  # the model, from tensors to logits
    "engine.prepare",  # from a batch to tensors
    "engine.launch_sampling",
    "engine.sample",  # waiting for tokens, or sampling them
    "engine.update",
    "kv.publish",  # one chunk of a prompt
    "kv.fetch",  # starting the read of one chunk
    "kv.write",  # writing one chunk to the cache
    "model.attention",
    "model.indexer",
    "model.mlp",
    "model.moe",
    "model.dispatch",
    "model.combine",
    "model.logits",
    "collective",  # sending, in a collective
    "collective.wait",
]
SPAN_NAMES: tuple[SpanName, ...] = get_args(SpanName)

_UNWATCHED = nullcontext()


class SpanListener(Protocol):
    """Called by the thread that runs the engine. Spans nest; `leave` is also called when an exception is raised."""

    def enter(self, name: SpanName) -> None: ...
    def leave(self, name: SpanName) -> None: ...


class _Span:
    """A span with listeners; it holds no state, so that one object can be entered repeatedly and nested."""

    def __init__(self, name: SpanName, listeners: tuple[SpanListener, ...]) -> None:
        self.name: SpanName = name
        self.listeners = listeners

    def __enter__(self) -> None:
        for listener in self.listeners:
            listener.enter(self.name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for listener in reversed(self.listeners):
            listener.leave(self.name)


class Spans:
    """The spans of one engine and their listeners."""

    def __init__(self) -> None:
        self._watched: dict[SpanName, _Span] = {}

    def __call__(self, name: SpanName) -> AbstractContextManager[None]:
        return self._watched.get(name, _UNWATCHED)

    def listeners(self, name: SpanName) -> tuple[SpanListener, ...]:
        """Listeners to the spans of this name, outermost first."""
        return self._watched[name].listeners if name in self._watched else ()

    def add(self, listener: SpanListener, names: Iterable[SpanName] = SPAN_NAMES) -> None:
        """Add a listener to the spans of these names, inside the listeners they have already."""
        for name in names:
            self._watched[name] = _Span(name, (*self.listeners(name), listener))
