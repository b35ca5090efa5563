"""NIXL's agent: tried before it is used, and without shared memory of a file system."""

from __future__ import annotations

import pytest

from shoal.parallel.nixl_agent import is_installed, trial_failure
from shoal.parallel.trial_run import trial_run

needs_nixl = pytest.mark.skipif(not is_installed(), reason="nixl-cu13 is not installed")


@needs_nixl
def test_the_trial_succeeds_where_nixl_works() -> None:
    assert trial_failure() is None


@needs_nixl
def test_an_agent_takes_nothing_of_dev_shm() -> None:
    """UCX crashes where it runs out of it, and containers have 64 MB."""
    statement = (
        "from shoal.parallel.nixl_agent import NixlAgent; agent = NixlAgent('shm', '127.0.0.1'); "
        "mapped = [line for line in open('/proc/self/maps') if '/dev/shm' in line]; assert not mapped, mapped"
    )
    assert trial_run(statement, timeout_s=600) is None
