"""What is on its way between a driver and its workers."""

from __future__ import annotations

from shoal.cluster.workers.wire import Abort, Command, EndPrefill, Event
from shoal.parallel.kv_transport import KVChunk
from shoal.runtime.types import PromptLoaded


def may_get_lost(message: Command | Event) -> bool:
    """Whether the hand-off must do without it, or with it twice, late or early: all but requests and answers."""
    return isinstance(message, KVChunk | EndPrefill | Abort | PromptLoaded)
