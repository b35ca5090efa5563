"""Named spans of a step that listeners watch: profilers, phase timers, failpoints.

    with spans("engine.run"):
        logits = ...

Code names what it does once; who watches, and which spans, is decided where an engine is built. A span that nobody
watches costs one dictionary lookup.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Literal, Protocol, get_args

SpanName = Literal[
    "engine.step",
    "engine.schedule",
    "engine.agree",  # the exchange in which ranks agree on a step
    "engine.run",  # the model, from tensors to logits
    "engine.prepare",  # from a batch to tensors
    "engine.launch_sampling",
    "engine.sample",  # waiting for tokens, or choosing them
    "engine.update",
    "kv.publish",  # one chunk of a prompt
    "kv.fetch",  # starting to read one chunk
    "kv.write",  # one chunk into the cache
    "model.attention",
    "model.indexer",
    "model.mlp",
    "model.moe",
    "model.dispatch",
    "model.combine",
    "model.logits",
    "collective",  # sending, in an exchange with other ranks
    "collective.wait",
]
SPAN_NAMES: tuple[SpanName, ...] = get_args(SpanName)

_UNWATCHED = nullcontext()


class SpanListener(Protocol):
    """Called by the thread that runs the engine. Spans nest; `leave` is also called when an exception passes."""

    def enter(self, name: SpanName) -> None: ...
    def leave(self, name: SpanName) -> None: ...


class _Span:
    """A span that somebody watches; it holds no state, so one object serves nested and repeated uses."""

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
    """The spans of one engine, and who listens to each."""

    def __init__(self) -> None:
        self._watched: dict[SpanName, _Span] = {}

    def __call__(self, name: SpanName) -> AbstractContextManager[None]:
        return self._watched.get(name, _UNWATCHED)

    def listeners(self, name: SpanName) -> tuple[SpanListener, ...]:
        """Listeners to the spans of this name, the outermost first."""
        return self._watched[name].listeners if name in self._watched else ()

    def add(self, listener: SpanListener, names: Iterable[SpanName] = SPAN_NAMES) -> None:
        """Let `listener` watch the spans of these names, inside those that watch them already."""
        for name in names:
            self._watched[name] = _Span(name, (*self.listeners(name), listener))
