"""How the ranks of a replica agree on what each step does."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.parallel.groups import ParallelGroups

from ..scheduling.batch import EMPTY_BATCH, Batch


@dataclass(frozen=True, slots=True)
class StepAgreement:
    """What the ranks of a replica agreed on before a step."""

    batch: Batch
    """The batch of this rank's attention group."""
    idle: bool
    """No rank has work."""
    stopped: bool
    """Some rank asked to stop."""
    woke: bool = False
    """The replica was idle and some rank has work now, which begins with the next step."""
    num_prompt_slices: int = 0
    """The most of any attention group; every rank takes part in as many."""

    @property
    def runs(self) -> bool:
        """Whether the step computes anything."""
        return not (self.idle or self.stopped or self.woke)


class Lockstep:
    """One rank's side of the agreement. All ranks call `agree` or `wake` once per step."""

    def __init__(self, groups: ParallelGroups) -> None:
        self._groups = groups
        self._num_steps = 0
        self._is_idle = True
        self._stop_requested = False

    @property
    def is_leader(self) -> bool:
        """Whether this rank schedules for its attention group; the others receive its batches."""
        return self._groups.is_leader

    @property
    def epoch(self) -> int:
        return self._groups.world.epoch

    @property
    def stop_requested(self) -> bool:
        """Whether this rank asked to stop."""
        return self._stop_requested

    @property
    def is_asleep(self) -> bool:
        """Whether the last step found no work on any of several ranks, so that this one calls `wake`."""
        return self._is_idle and self._groups.world.size > 1

    def request_stop(self) -> None:
        """Make every rank of the replica stop in the next step."""
        self._stop_requested = True

    def begin_step(self) -> None:
        """Number the step, for the headers of its collectives."""
        self._num_steps += 1
        self._groups.set_step(self._num_steps)

    def wake(self, has_work: bool) -> StepAgreement:
        """Called while the replica is idle: learn whether any rank has work, but do not run it yet.

        A rank that started alone would make the others wait, and would stay a step ahead until it runs out of work.
        """
        row = [int(has_work), int(self._stop_requested)]
        rows = self._groups.world.all_gather_ints(row, layer=-1, op="engine.wake")
        self._is_idle = not any(has_work for has_work, _ in rows)
        stopped = any(stop for _, stop in rows)
        return StepAgreement(EMPTY_BATCH, self._is_idle, stopped, woke=not self._is_idle)

    def agree(self, batch: Batch, num_prompt_slices: int) -> StepAgreement:
        """Learn whether any rank has work or wants to stop; followers receive the batch of their leader."""
        world = self._groups.world
        if world.size == 1:
            self._is_idle = batch.is_empty
            return StepAgreement(batch, batch.is_empty, self._stop_requested, num_prompt_slices=num_prompt_slices)
        packed = b"" if batch.is_empty else batch.pack()
        row = [len(packed), int(self._stop_requested), num_prompt_slices]
        rows = world.all_gather_ints(row, layer=-1, op="engine.agree")
        self._is_idle = not any(num_bytes for num_bytes, _, _ in rows)
        stopped = any(stop for _, stop, _ in rows)
        if not stopped:
            batch = self._share_batch(batch, packed, rows[self._groups.leader_rank][0])
        return StepAgreement(
            batch, self._is_idle, stopped, num_prompt_slices=max(num_slices for _, _, num_slices in rows)
        )

    def _share_batch(self, batch: Batch, packed: bytes, num_bytes: int) -> Batch:
        """The leader's batch, which has `num_bytes` when packed, on all ranks of its attention group."""
        tp = self._groups.tp
        if num_bytes == 0 or tp.size == 1:
            return batch
        received = tp.broadcast_bytes(packed or None, num_bytes, 0, layer=-1, op="engine.batch")
        return batch if self.is_leader else Batch.unpack(received)

    def share_payload(self, payload: Tensor | None, num_bytes: int) -> Tensor:
        """The leader's payload, [num_bytes] uint8, on all ranks of its attention group; followers pass None."""
        tp = self._groups.tp
        if tp.size == 1:
            assert payload is not None
            return payload
        data = None if payload is None else payload.numpy().tobytes()
        received = tp.broadcast_bytes(data, num_bytes, 0, layer=-1, op="engine.kv_entries")
        return torch.frombuffer(bytearray(received), dtype=torch.uint8) if payload is None else payload

    def rejoin(self, replaced: Collection[int]) -> bool:
        """Start over after the groups were joined again; returns whether this attention group lost KV.

        `replaced`: ranks with a new process, whose caches are empty.
        """
        self._num_steps = 0
        self._is_idle = True
        return not set(replaced).isdisjoint(self._groups.config.tp_group(self._groups.rank))
