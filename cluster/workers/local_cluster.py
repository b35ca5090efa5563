"""A Ray cluster of several nodes on this machine, for tests and demonstrations of lost nodes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from .ray_environment import choose_temp_dir, ensure_token, job_config


@contextmanager
def local_cluster(num_nodes: int, num_cpus: int) -> Iterator[None]:
    """Start and connect to a cluster of a head without CPUs and `num_nodes` nodes with `num_cpus` CPUs each.

    Dead nodes are detected within about 2 s; with Ray's defaults it takes 15 s.
    """
    from ray._private.authentication import authentication_token_setup as authentication
    from ray.cluster_utils import Cluster

    logging.getLogger("ray").setLevel(logging.ERROR)
    ensure_token(os.environ)
    authentication.enable_token_auth_by_default()  # as `ray.init` does for a cluster of one node
    authentication.ensure_token_if_auth_enabled()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quick = {
        "health_check_initial_delay_ms": 1000,
        "health_check_period_ms": 200,
        "health_check_timeout_ms": 500,
        "health_check_failure_threshold": 3,
    }
    temp_dir = os.path.join(os.path.abspath(choose_temp_dir(os.environ)), "ray")
    head = {"num_cpus": 0, "temp_dir": temp_dir, "_system_config": quick}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(num_nodes):
            cluster.add_node(num_cpus=num_cpus, wait=False)
        cluster.wait_for_nodes(timeout=60)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR, job_config=job_config())
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]
