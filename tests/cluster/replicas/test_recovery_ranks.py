"""Workers that are killed and frozen, some of the ranks of a replica: `tests/support/faults.py` judges."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shoal.cluster.supervision import supervisor as supervisor_module
from tests.support.faults import Bits, Rig, Target, answers_of_one_process, make_model, rig

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model: str) -> list[Bits]:
    return answers_of_one_process(model)


def test_a_cluster_of_one_worker_without_spares(model: str, expected: list[Bits]) -> None:
    with rig(model, expected, spares=0) as alone:
        (fault,) = alone.run(lambda: alone.arm([Target(0, 0, "engine.run", 9)]))
        assert fault.worker == "mixed:0"
        assert fault.to_dict()["replica"] == 0


@pytest.fixture(scope="module")
def mixed(model: str, expected: list[Bits]) -> Iterator[Rig]:
    with rig(model, expected, tensor_parallel_size=2, data_parallel_size=2, collective_timeout_s=5.0) as built:
        yield built


@pytest.mark.parametrize(
    ("targets", "spares"),
    [
        ([Target(0, 1, "collective", 150)], ""),
        ([Target(0, 2, "engine.update", 5), Target(0, 3, "engine.run", 6)], ""),
        ([Target(0, 0, "engine.run", 7), Target(0, 3, "worker.join")], "{}:worker.join:1"),
    ],
    ids=["follower", "a leader and its follower", "one, a survivor that joins again, and the replacement"],
)
def test_the_ranks_of_a_replica_are_replaced(mixed: Rig, targets: list[Target], spares: str) -> None:
    faults = mixed.run(lambda: mixed.arm(targets, spares))
    lost = [(f.rank, f.point) for f in faults if f.rank is not None]
    assert {(t.rank, t.point) for t in targets} <= set(lost)
    assert len(lost) == len(targets) + bool(spares), mixed.pool.faults


def test_a_rank_that_hangs_is_found_by_its_missing_steps(mixed: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It beats, and the others wait for it in a collective until that has taken too long."""
    monkeypatch.setattr(supervisor_module, "STALL_GRACE_S", 4.0)
    (fault,) = mixed.run(lambda: mixed.arm([Target(0, 1, "engine.run", 9, "hang")]))
    assert (fault.rank, fault.point, fault.reason) == (1, "engine.run", "no step ended in 9 s: stuck")
