"""Which groups computed which prompt prefixes lately: a guess at what their prefix caches hold."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

PREFIX_TOKENS = 256
"""Granularity of the prefixes that are remembered."""
MAX_PREFIXES = 200_000
MAX_HOLDERS = 4
"""Groups that are remembered per prefix, the latest ones."""


class PrefixIndex:
    """Prefixes and their latest holders, at most `MAX_PREFIXES`: an approximation of LRU.

    Prefixes move to the younger of two generations when they are used; when the younger is full, the older is dropped.
    That takes one dictionary access per use, where an exact LRU order takes several.
    """

    def __init__(self) -> None:
        self._young: dict[int, tuple[int, ...]] = {}
        self._old: dict[int, tuple[int, ...]] = {}

    def __len__(self) -> int:
        return len(self._young.keys() | self._old.keys())

    def __contains__(self, prefix: int) -> bool:
        return prefix in self._young or prefix in self._old

    def add(self, prefixes: Sequence[int], group: int) -> None:
        """Note that a group computes a prompt with these prefixes, the shortest first."""
        young, old = self._young, self._old
        for prefix in prefixes:
            known = young.get(prefix) or old.get(prefix)
            young[prefix] = (group,) if known is None else (*[g for g in known if g != group], group)[-MAX_HOLDERS:]
        if len(young) >= MAX_PREFIXES // 2:
            self._young, self._old = {}, young

    def find(self, prefixes: Sequence[int]) -> dict[int, int]:
        """The groups with the longest known prefix, and its length in tokens."""
        # A known prefix has all its own prefixes known, as they are used together.
        number = bisect_right(prefixes, False, key=lambda prefix: prefix not in self)
        if number == 0:
            return {}
        longest = prefixes[number - 1]
        return dict.fromkeys(self._young.get(longest) or self._old[longest], number * PREFIX_TOKENS)


def prefix_hashes(token_ids: tuple[int, ...]) -> list[int]:
    """Hashes of the first PREFIX_TOKENS, 2 x PREFIX_TOKENS, .. tokens; equal hashes are taken for equal prefixes."""
    hashes = []
    chained = 0
    for start in range(0, len(token_ids) - PREFIX_TOKENS + 1, PREFIX_TOKENS):
        chained = hash((chained, token_ids[start : start + PREFIX_TOKENS]))
        hashes.append(chained)
    return hashes
