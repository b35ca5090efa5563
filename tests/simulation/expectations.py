"""EXPECTED DEFECTS of the router: known, not mended yet, and stepped around so that others are seen.

1. `_progress`: a decode group that gave up on the prefill tells its first tokens, too; the router, which has them from
   the prefill group already, stops with "progress is told in order".
2. `lose`, `_loaded`: a decode group goes on alone with a request that asked for logprobs of its prompt; only the
   prefill group would have told them.

`test_expectations` fails as soon as one of them is mended: then its part here goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from shoal.cluster.routing import RequestRouter
from shoal.runtime.types import GeneratedTokens, RequestOutput, RequestProgress

from .model import Row

ROUTER_PROGRESS = RequestRouter._progress


@contextmanager
def progress_may_be_told_twice() -> Iterator[None]:
    """The first expected defect does not show."""

    def new_progress(self: RequestRouter, tracked: Any, progress: RequestProgress) -> Any:
        num_known = len(tracked.generated[progress.index].token_ids)
        told, logprobs = num_known - progress.start, progress.new.logprobs
        new = GeneratedTokens(progress.new.token_ids[told:], None if logprobs is None else logprobs[told:])
        return ROUTER_PROGRESS(self, tracked, replace(progress, start=num_known, new=new)) if new.token_ids else []

    router: Any = RequestRouter
    router._progress = new_progress
    try:
        yield
    finally:
        router._progress = ROUTER_PROGRESS


def lacks_prompt_logprobs(row: Row, output: RequestOutput) -> bool:
    """Whether the second expected defect shows."""
    return row.request.params.prompt_logprobs is not None and output.prompt_logprobs is None
