"""An actor of somebody else's, such as Ray Data, in which engines with workers are started, and its end.

Ray keeps a placement group until its job ends, whatever becomes of the actor that made it, and an actor that is no
longer wanted first waits for all calls that it made: a worker's loop is one that ends only with the worker. After 5 s
such an actor is killed.
"""

from __future__ import annotations

import secrets
import threading
import time

import ray
from ray.util.placement_group import get_placement_group, placement_group_table, remove_placement_group

LOOK_S = 0.5


def own_actor_id() -> str | None:
    """The id of the actor that this process is, the same after a restart; None for a driver."""
    actor_id: str | None = ray.get_runtime_context().get_actor_id()
    return actor_id


def group_name() -> str:
    """A new name for a placement group of this process; empty in a driver, whose groups go with its job."""
    actor_id = own_actor_id()
    return "" if actor_id is None else f"{_prefix(actor_id)}{secrets.token_hex(8)}"


def remove_groups() -> None:
    """Release what this actor reserved, in earlier processes too; workers that run there are killed."""
    actor_id = own_actor_id()
    if actor_id is None:
        return
    for group in placement_group_table().values():
        if group["name"].startswith(_prefix(actor_id)) and group["state"] != "REMOVED":
            remove_placement_group(get_placement_group(group["name"]))


def remove_groups_at_end() -> None:
    """Release it on another thread once Ray counts this actor as dead; a driver's groups go with its job."""
    actor_id = own_actor_id()
    if actor_id is not None:
        threading.Thread(target=_wait_for_end, args=(actor_id,), name="shoal-actor-end", daemon=True).start()


def _wait_for_end(actor_id: str) -> None:
    from ray._private import state  # Ray's public interface to it needs the dashboard

    while state.actors(actor_id).get("State") != "DEAD":
        time.sleep(LOOK_S)
    remove_groups()


def _prefix(actor_id: str) -> str:
    return f"shoal-{actor_id}-"
