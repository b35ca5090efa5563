"""Engines that tests of the routes share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shoal.cluster.replicas.engine_thread import EngineThread
from tests.support.app import start_engines


@pytest.fixture(scope="module")
def engines() -> Iterator[EngineThread]:
    thread = start_engines()
    yield thread
    thread.close()
