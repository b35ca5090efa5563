"""What fits where is arithmetic on the nodes; connecting is tried once, on an embedded Ray."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from shoal.cluster.environment import num_cores
from shoal.cluster.workers import ray_cluster
from shoal.cluster.workers.ray_cluster import (
    InsecureCluster,
    Layout,
    LayoutDoesNotFit,
    Node,
    check_fits,
    connect,
    core_shares,
    nodes,
    place,
    placement_strategies,
)
from shoal.cluster.workers.ray_environment import check_answers
from shoal.parallel.config import ParallelConfig

GIB = 1 << 30


def node(
    name: str = "a", *, cpus: float = 8, gpus: float = 0, memory: int = 100 * GIB, gpu_memory: int | None = None
) -> Node:
    return Node(
        node_id=name,
        address="10.0.0.1",
        num_cpus=cpus,
        num_gpus=gpus,
        memory_bytes=memory,
        gpu_memory_bytes=gpu_memory,
    )


def layout(tp: int = 1, dp: int = 1, replicas: int = 1, *, spares: int = 0, cpus: int = 1, gpus: int = 0) -> Layout:
    return Layout(
        replicas=(ParallelConfig(tensor_parallel_size=tp, data_parallel_size=dp),) * replicas,
        spares=spares,
        num_cpus_per_worker=cpus,
        num_gpus_per_worker=gpus,
    )


def test_a_layout_that_just_fits_is_taken() -> None:
    check_fits(layout(2, 4), [node(cpus=8)])
    check_fits(layout(2, 2, 2, cpus=3), [node("a", cpus=11), node("b", cpus=15)])  # 3 + 5 workers
    check_fits(layout(8, gpus=1), [node(cpus=8, gpus=8)])


def test_missing_resources_are_given_in_numbers_with_what_would_fit() -> None:
    with pytest.raises(LayoutDoesNotFit) as refused:
        check_fits(layout(tp=4, dp=2, replicas=2, cpus=2), [node("a", cpus=8), node("b", cpus=4)])
    message = str(refused.value)
    assert "needs 16 workers with 2 CPU each = 32 CPU" in message
    assert "has 12 CPU on 2 node(s), room for 6 workers (20 CPUs missing)" in message
    assert "tensor_parallel_size=2 data_parallel_size=1 replicas=2" in message
    options = message.split("Layouts that fit: ")[1].split("; ")
    sizes = [[int(part.split("=")[1]) for part in option.split()] for option in options]
    assert [tp * dp * replicas for tp, dp, replicas in sizes] == [4, 4, 4]


def test_pieces_too_small_and_missing_gpus_are_told_apart() -> None:
    with pytest.raises(LayoutDoesNotFit, match=r"room for 2 workers .*too fragmented"):
        check_fits(layout(tp=3, cpus=2), [node("a", cpus=3), node("b", cpus=3)])
    with pytest.raises(LayoutDoesNotFit, match=r"2 CPU and 2 GPU; .* 1 GPU on 1 node.*1 GPUs missing"):
        check_fits(layout(tp=2, gpus=1), [node(gpus=1)])
    with pytest.raises(LayoutDoesNotFit, match="No layout of this model fits"):
        check_fits(layout(gpus=1), [node()])


def test_replicas_are_packed_on_one_node_while_one_has_room() -> None:
    assert placement_strategies(layout(4, replicas=1), [node("a", cpus=2), node("b", cpus=4)]) == ["STRICT_PACK"]
    assert placement_strategies(layout(4, replicas=1), [node("a", cpus=2), node("b", cpus=2)]) == ["PACK"]
    assert placement_strategies(layout(4, replicas=3), [node("a", cpus=6), node("b", cpus=6)]) == [
        "STRICT_PACK",
        "STRICT_PACK",
        "PACK",
    ]


class FakePlacement:
    def __init__(self, *node_ids: str) -> None:
        self.node_ids = node_ids


def test_workers_share_the_cores_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    def shares(
        given: Any, cpus: int, *, embedded: bool = False, num_threads: int | None = None
    ) -> list[list[tuple[int, bool]]]:
        available = [node("a", cpus=cpus), node("b", cpus=8)]
        found = core_shares(given, available, embedded=embedded, num_threads=num_threads)
        return [[(share.num_threads, share.dedicated) for share in replica] for replica in found]

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    placements: Any = [FakePlacement("a", "a"), FakePlacement("a", "b")]
    assert shares(placements, 8) == [[(2, True), (2, True)], [(2, True), (8, True)]]
    assert shares(placements, 2) == [[(1, False), (1, False)], [(1, False), (8, True)]]
    assert shares(placements, 8, num_threads=3) == [[(3, False), (3, False)], [(3, False), (3, True)]]
    monkeypatch.setattr(ray_cluster, "num_cores", lambda: 4)
    assert shares(placements[:1], 99, embedded=True) == [[(2, True), (2, True)]]
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert shares(placements, 8) == [[(2, True), (2, True)], [(2, True), (3, True)]]
    assert shares(placements, 8, num_threads=8)[1][1] == (8, True)


@pytest.fixture(scope="module")
def embedded() -> Iterator[ray_cluster.RayCluster]:
    assert "RAY_ADDRESS" not in os.environ
    cluster = connect(None, num_cpus=num_cores() + 3)
    yield cluster
    cluster.close()
    assert not ray.is_initialized()


@pytest.mark.ray
def test_the_embedded_ray_has_a_cpu_for_every_worker(embedded: ray_cluster.RayCluster) -> None:
    assert (embedded.embedded, embedded.owned) == (True, True)
    (only,) = nodes()
    assert only.num_cpus == num_cores() + 3
    assert only.memory_bytes > 0
    assert ray_cluster.authentication_enabled()
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


@pytest.mark.ray
def test_a_running_cluster_answers(embedded: ray_cluster.RayCluster) -> None:
    check_answers(ray.get_runtime_context().gcs_address)


@pytest.mark.ray
def test_an_existing_connection_is_used_and_left_open(embedded: ray_cluster.RayCluster) -> None:
    again = connect("ray://nowhere", num_cpus=1000)
    assert (again.embedded, again.owned) == (False, False)
    again.close()
    assert ray.is_initialized()


@pytest.mark.ray
def test_several_nodes_without_authentication_are_refused(
    embedded: ray_cluster.RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "nodes", lambda: [node("a"), node("b")])
    connect(None, num_cpus=1)
    monkeypatch.setattr(ray_cluster, "authentication_enabled", lambda: False)
    with pytest.raises(InsecureCluster, match="RAY_AUTH_MODE=token"):
        connect(None, num_cpus=1)
    connect(None, num_cpus=1, insecure=True)
    monkeypatch.setattr(ray_cluster, "nodes", lambda: [node("a")])
    connect(None, num_cpus=1)


@pytest.mark.ray
def test_resources_are_reserved_and_given_back(embedded: ray_cluster.RayCluster) -> None:
    available = nodes()
    asked = layout(tp=num_cores() + 3)
    (placement,) = place(asked, available, timeout_s=300.0)
    assert placement.node_ids == (available[0].node_id,) * (num_cores() + 3)
    with pytest.raises(LayoutDoesNotFit, match=r"1 of 1 replicas got no place in 0\.2 s.*other work holds"):
        place(layout(), available, timeout_s=0.2)
    placement.remove()
    (after,) = place(asked, available, timeout_s=300.0)
    after.remove()


@pytest.mark.ray
def test_a_ray_job_joins_its_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: seen.append(options))
    monkeypatch.setattr(ray_cluster, "nodes", list)
    monkeypatch.setattr(ray_cluster, "check_answers", lambda address: None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert connect(None, num_cpus=8) == ray_cluster.RayCluster(embedded=False, owned=True)
    assert connect("10.0.0.2:6379", num_cpus=8).owned
    assert [options["address"] for options in seen] == ["10.0.0.1:6379", "10.0.0.2:6379"]
    assert all("num_cpus" not in options for options in seen)


def test_what_ray_says_of_a_cluster_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(ValueError, match=r"no Ray cluster answers at auto: Could not find any .*RAY_ADDRESS"):
        connect("auto", num_cpus=1)


def test_a_signal_during_the_connection_is_delivered_after_it() -> None:
    reached = []

    def connecting() -> None:
        with ray_cluster.signals_deferred():
            os.kill(os.getpid(), signal.SIGINT)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as ray.init installs a handler of its own
            time.sleep(0.01)
            reached.append(True)

    # Handlers that this test knows: an earlier Ray may have left its own.
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGTERM: signal.signal(signal.SIGTERM, signal.SIG_DFL),
    }
    try:
        with pytest.raises(KeyboardInterrupt):
            connecting()
        assert reached
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
