"""Which groups computed which beginnings of prompts lately: a guess at what their caches hold."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence

PREFIX_TOKENS = 256
"""Prompts are known by their beginnings, in steps of so many tokens."""
MAX_PREFIXES = 200_000
MAX_HOLDERS = 4
"""Groups that are remembered for one beginning, the latest ones."""


class PrefixIndex:
    """Beginnings that were not used for long are forgotten, longer ones before those that they begin with."""

    def __init__(self) -> None:
        self._holders: OrderedDict[int, tuple[int, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holders)

    def add(self, prefixes: Sequence[int], group: int) -> None:
        """A group computes a prompt with these beginnings, the shortest first."""
        holders = self._holders
        for prefix in reversed(prefixes):
            known = holders.get(prefix)
            if known is None:
                holders[prefix] = (group,)
                continue
            holders.move_to_end(prefix)
            if known[-1] != group:
                holders[prefix] = (*[g for g in known if g != group], group)[-MAX_HOLDERS:]
        while len(holders) > MAX_PREFIXES:
            holders.popitem(last=False)

    def find(self, prefixes: Sequence[int]) -> dict[int, int]:
        """Groups with the longest known beginning, and its length in tokens."""
        # Whoever is known is known with all that it begins with.
        number = bisect_right(prefixes, False, key=lambda prefix: prefix not in self._holders)
        if number == 0:
            return {}
        return dict.fromkeys(self._holders[prefixes[number - 1]], number * PREFIX_TOKENS)


def prefix_hashes(token_ids: tuple[int, ...]) -> list[int]:
    """One number for every beginning of PREFIX_TOKENS, 2 x PREFIX_TOKENS, .. tokens; equal numbers are a good guess."""
    hashes = []
    chained = 0
    for start in range(0, len(token_ids) - PREFIX_TOKENS + 1, PREFIX_TOKENS):
        chained = hash((chained, token_ids[start : start + PREFIX_TOKENS]))
        hashes.append(chained)
    return hashes
