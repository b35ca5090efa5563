"""Workers that are killed and frozen, in every role, while they work: `tests/support/faults.py` judges."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import pytest

from shoal.cluster.supervision import supervisor as supervisor_module
from tests.support.faults import Bits, Rig, Target, answers_of_one_process, gone, make_model, rig

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model: str) -> list[Bits]:
    return answers_of_one_process(model)


@pytest.fixture(scope="module")
def split(model: str, expected: list[Bits]) -> Iterator[Rig]:
    with rig(model, expected, replicas=["prefill:1", "decode:1"]) as built:
        yield built


PREFILL, DECODE = (0, 0), (1, 0)


@pytest.mark.parametrize(
    ("victim", "point", "nth", "action"),
    [
        (DECODE, "engine.run", 9, "kill"),
        (DECODE, "kv.write", 2, "kill"),
        (DECODE, "worker.hand_out", 15, "kill"),
        (DECODE, "engine.sample", 12, "stop"),
        (PREFILL, "kv.publish", 3, "kill"),
        (PREFILL, "worker.hand_out", 4, "kill"),
    ],
    ids=lambda value: str(value).replace("(0, 0)", "prefill").replace("(1, 0)", "decode"),
)
def test_a_lost_worker_changes_nothing(split: Rig, victim: tuple[int, int], point: str, nth: int, action: str) -> None:
    (fault,) = split.run(lambda: split.arm([Target(*victim, point, nth, action)]))
    assert (fault.replica, fault.rank, fault.point) == (*victim, point)
    assert fault.reason == ("its connection ended" if action == "kill" else "silent for 5 s")
    assert fault.formed_s is not None
    assert fault.first_token_s is not None
    assert fault.num_replayed_requests > 0


def test_both_roles_at_once_with_one_spare(split: Rig) -> None:
    faults = split.run(lambda: split.arm([Target(*PREFILL, "kv.publish", 4), Target(*DECODE, "engine.update", 6)]))
    assert sorted((f.replica, f.rank) for f in faults if f.replica is not None) == [(0, 0), (1, 0)]


def test_a_replacement_that_dies_while_it_loads_is_replaced(split: Rig) -> None:
    faults = split.run(lambda: split.arm([Target(*DECODE, "engine.run", 9)], spares="{}:worker.build:1"))
    assert [f.point for f in faults] == ["engine.run", "worker.build"]
    assert {(f.replica, f.rank) for f in faults} == {DECODE}


def test_a_frozen_worker_that_thaws_finds_itself_replaced(split: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its process cannot be ended, as on a node that is cut off, its own end of the connection ends it."""
    monkeypatch.setattr(supervisor_module, "end_worker", lambda worker, process: None)
    pid = split.pid(*DECODE)

    def thaw() -> None:
        assert not gone(pid)
        os.kill(pid, signal.SIGCONT)
        deadline = time.monotonic() + 10
        while not gone(pid):
            assert time.monotonic() < deadline, "it goes on although it was replaced"
            time.sleep(0.02)

    try:
        (fault,) = split.run(lambda: split.arm([Target(*DECODE, "engine.run", 9, "stop")]), then=thaw)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert (fault.replica, fault.rank, fault.reason) == (*DECODE, "silent for 5 s")
