r"""Members of a replica: which worker holds which rank, and when the ranks must form their groups again.

A state machine without a clock and without I/O:

    formed --a worker is lost--> incomplete --every rank has a worker with weights--> forming --all joined--> formed
       \--ranks left although no worker was lost---------------------------------------^

Each new forming is a new epoch. Messages, aborts and reports of an earlier epoch are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Leave:
    """Order a worker to leave this epoch and earlier ones: its peers will not answer."""

    worker: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Join:
    """Order a worker to join a new epoch; ranks in `replaced` have a new worker since all last joined."""

    worker: str
    rank: int
    epoch: int
    replaced: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Need:
    """Find a worker for this rank and pass it to `fill`."""

    rank: int


@dataclass(frozen=True, slots=True)
class Load:
    """Order a worker to load the weights of a rank, before the others wait for it in a collective."""

    worker: str
    rank: int


@dataclass(frozen=True, slots=True)
class Formed:
    """All ranks have joined this epoch."""

    epoch: int


Action = Leave | Join | Need | Load | Formed


class Membership:
    """The ranks of one replica; every method is an event and returns the actions to carry out, in order."""

    def __init__(self, workers: Sequence[str]) -> None:
        """`workers[rank]`, all of which have formed epoch 0."""
        self.epoch = 0
        self.workers: list[str | None] = list(workers)
        self._replaced: set[int] = set()
        self._loading: set[int] = set()
        self._joining: set[int] = set()
        self._joined = set(range(len(workers)))

    @property
    def complete(self) -> bool:
        """Whether every rank has a worker with its weights."""
        return None not in self.workers and not self._loading

    @property
    def formed(self) -> bool:
        """Whether the replica is complete and all ranks have joined."""
        return self.complete and len(self._joined) == len(self.workers)

    @property
    def missing(self) -> list[str]:
        """Workers that the others wait for: ordered to join, but not joining yet.

        When all are joining and do not find each other, all that have not joined.
        """
        if not self.complete:
            return []
        absent = [rank for rank in range(len(self.workers)) if rank not in self._joined]
        late = [rank for rank in absent if rank not in self._joining] or absent
        return [w for rank in late if (w := self.workers[rank]) is not None]

    def lose(self, worker: str) -> list[Action]:
        """A worker is lost; ignored for a worker without a rank in this replica."""
        if worker not in self.workers:
            return []
        rank = self.workers.index(worker)
        self.workers[rank] = None
        self._replaced.add(rank)
        self._loading.discard(rank)
        return [*self._leave(), Need(rank)]

    def fill(self, rank: int, worker: str) -> list[Action]:
        """A worker was found for a vacant rank."""
        assert self.workers[rank] is None, f"rank {rank} has worker {self.workers[rank]}"
        self.workers[rank] = worker
        self._loading.add(rank)
        return [Load(worker, rank)]

    def loaded(self, worker: str) -> list[Action]:
        """A worker has loaded the weights of its new rank."""
        if worker not in self.workers or (rank := self.workers.index(worker)) not in self._loading:
            return []
        self._loading.remove(rank)
        return self._join() if self.complete else []

    def reform(self, epoch: int) -> list[Action]:
        """A rank left `epoch` although no worker was lost: all ranks leave and join again."""
        if epoch != self.epoch or not self.complete:
            return []
        return [*self._leave(), *self._join()]

    def joining(self, worker: str, epoch: int) -> None:
        """A worker has begun to join an epoch and waits for the others."""
        if epoch == self.epoch and worker in self.workers:
            self._joining.add(self.workers.index(worker))

    def join(self, worker: str, epoch: int) -> list[Action]:
        """A worker has joined an epoch."""
        if epoch != self.epoch or worker not in self.workers or self.workers.index(worker) in self._loading:
            return []
        self._joined.add(self.workers.index(worker))
        if not self.formed:
            return []
        self._replaced.clear()
        return [Formed(epoch)]

    def _leave(self) -> list[Action]:
        return [Leave(worker, self.epoch) for worker in self.workers if worker is not None]

    def _join(self) -> list[Action]:
        self.epoch += 1
        self._joining.clear()
        self._joined.clear()
        replaced = tuple(sorted(self._replaced))
        return [Join(w, rank, self.epoch, replaced) for rank, w in enumerate(self.workers) if w is not None]
