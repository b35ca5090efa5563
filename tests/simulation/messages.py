"""What is on its way between a driver and its workers."""

from __future__ import annotations

from dataclasses import replace

from shoal.cluster.workers.wire import Abort, Command, EndPrefill, Event
from shoal.parallel.kv_transport import KVChunk
from shoal.runtime.types import PromptLoaded, RequestOutput


def may_get_lost(message: Command | Event) -> bool:
    """Whether the hand-off must do without it, or with it twice, late or early: all but questions and answers."""
    return isinstance(message, KVChunk | EndPrefill | Abort | PromptLoaded)


def snapshot(event: Event) -> Event:
    """An event as it is when it is told: the engine goes on adding to its outputs."""
    if not isinstance(event, RequestOutput):
        return event
    outputs = [
        replace(o, token_ids=list(o.token_ids), logprobs=None if o.logprobs is None else list(o.logprobs))
        for o in event.outputs
    ]
    return replace(event, outputs=outputs)
