"""Several Ray nodes on this machine, of which one loses power: its ranks go to others without waiting for Ray."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import ray

from shoal.cluster.workers import ray_cluster
from shoal.cluster.workers.local_cluster import local_cluster
from tests.support.faults import Target, answers_of_one_process, make_model, rig

pytestmark = pytest.mark.ray


@pytest.fixture
def nodes() -> Iterator[None]:
    with local_cluster(num_nodes=4, num_cpus=1):
        yield
    assert not ray.is_initialized()


def test_the_ranks_of_a_lost_node_go_to_spares(tmp_path_factory: pytest.TempPathFactory, nodes: None) -> None:
    model = make_model(tmp_path_factory.mktemp("model"))
    expected = answers_of_one_process(model)
    with rig(model, expected, replicas=["prefill:1", "decode:1:dp=2"]) as cluster:
        where = {cluster.worker(*place).slot.node_id for place in ((0, 0), (1, 0), (1, 1))}
        assert len(where) == 3, "every worker has a node of its own"
        target = Target(1, 1, "engine.run", 9, "node")
        faults = cluster.run(lambda: cluster.arm([target]), then=lambda: setattr(cluster, "num_spares", 0))
        (fault,) = [f for f in faults if f.rank is not None]
        assert (fault.replica, fault.rank, fault.worker) == (1, 1, "decode:1")
        assert cluster.worker(1, 1).label == "spare:0"
        deadline = time.monotonic() + 60
        while len(ray_cluster.nodes()) > 4:  # the head and three more, once Ray has noticed, too
            assert time.monotonic() < deadline
            time.sleep(0.1)
