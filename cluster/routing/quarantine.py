"""Which requests may run together after workers were lost, until the request that is the cause is found: no I/O.

A request cannot be blamed for a loss that it shares with others. So requests that were interrupted repeatedly run in
ever smaller company, with every other request held back; one whose workers are lost while it runs alone is given up.

    losses    0 or 1       2               3 and more
    runs      with all     with 7 others   alone; given up after MAX_LOSSES, MAX_ALONE of them alone
"""

from __future__ import annotations

from collections.abc import Collection

MAX_LOSSES = 4
MAX_ALONE = 2

_MIN_SUSPECT = 2
"""One loss in common is bad luck: most losses have nothing to do with requests."""
_COMPANY = {2: 8}
"""Requests that run together, by their losses; 1 beyond."""


class Quarantine:
    """Counts the losses of unfinished requests; every method but `allowed` is one event."""

    def __init__(self) -> None:
        self._losses: dict[str, int] = {}
        self._alone: dict[str, int] = {}
        """Losses while nothing else ran on the replica."""
        self._company: set[str] = set()
        """Suspects that run now."""

    def add(self, request_id: str, num_losses: int) -> None:
        """Take over a request that was interrupted so often in earlier runs."""
        if num_losses:
            self._losses[request_id] = num_losses

    def lose(self, interrupted: Collection[str]) -> list[str]:
        """Note that a replica with these requests lost a worker; returns those that are given up."""
        for request_id in interrupted:
            self._losses[request_id] = self.num_losses(request_id) + 1
        self._company.clear()
        if len(interrupted) != 1:
            return []
        (request_id,) = interrupted
        self._alone[request_id] = self._alone.get(request_id, 0) + 1
        to_blame = self._losses[request_id] >= MAX_LOSSES and self._alone[request_id] >= MAX_ALONE
        return [request_id] if to_blame else []

    def forget(self, request_id: str) -> None:
        """Drop a request that is finished."""
        self._losses.pop(request_id, None)
        self._alone.pop(request_id, None)
        self._company.discard(request_id)

    def num_losses(self, request_id: str) -> int:
        """How often the request was interrupted."""
        return self._losses.get(request_id, 0)

    def allowed(self) -> frozenset[str] | None:
        """The requests that may be sent to replicas now; None: all."""
        if not self._company:
            self._company = self._next_company()
        return frozenset(self._company) or None

    def _next_company(self) -> set[str]:
        """The suspects with the fewest losses: they are the likeliest to finish."""
        suspects = [request_id for request_id, losses in self._losses.items() if losses >= _MIN_SUSPECT]
        if not suspects:
            return set()
        fewest = min(self._losses[request_id] for request_id in suspects)
        same = [request_id for request_id in suspects if self._losses[request_id] == fewest]
        return set(same[: _COMPANY.get(fewest, 1)])
