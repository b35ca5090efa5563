"""The defects that `expectations` steps around are there; when a test here fails, what it is about is mended."""

from __future__ import annotations

import pytest

from shoal.cluster.routing import RequestRouter

from . import oracle
from .expectations import ROUTER_PROGRESS
from .search import Search
from .test_handoff_search import THREE_CHUNKS, scope


def test_the_router_hears_the_first_tokens_twice() -> None:
    assert RequestRouter._progress is ROUTER_PROGRESS
    with pytest.raises(AssertionError, match="progress is told in order"):
        Search(scope(THREE_CHUNKS, max_faults=1)).run()


def test_a_decode_group_alone_does_not_know_the_logprobs_of_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "lacks_prompt_logprobs", lambda row, output: False)
    searched = scope(THREE_CHUNKS, max_faults=1, faults=("kill",), prompt_logprobs=0)
    with pytest.raises(AssertionError, match="wrong logprobs of the prompt"):
        Search(searched).run()
