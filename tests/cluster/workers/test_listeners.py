"""What a running cluster shows to the machine that it runs on: its sockets, and nothing secret."""

from __future__ import annotations

import importlib.util
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.worker import global_worker

from shoal.cluster.engine_args import EngineArgs
from shoal.cluster.replicas.start import start_engines
from shoal.cluster.workers.ray_cluster import connect, node_address
from shoal.runtime.random_checkpoint import tiny_config
from tests.support.sockets import listening
from tests.support.stub_engine import STUB

pytestmark = pytest.mark.ray

RAY_TOKEN = Path.home() / ".ray" / "auth_token"


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    cluster = connect(None, num_cpus=4)
    yield
    cluster.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps(tiny_config("deepseek_v3")))
    return str(directory)


def hosts(pid: int) -> Counter[str]:
    return Counter(host for host, _ in listening(pid))


def hosts_of_a_plain_actor() -> Counter[str]:
    """What Ray itself listens on in a process of an actor."""
    actor: Any = ray.remote(num_cpus=0)(type("Plain", (), {"pid": lambda self: os.getpid()})).remote()
    found = hosts(ray.get(actor.pid.remote()))
    ray.kill(actor)
    return found


def worker_pids() -> list[int]:
    names = [name for name in ray.util.list_named_actors() if str(name).startswith("shoal-")]
    actors: list[Any] = [ray.get_actor(name) for name in names]
    pids: list[int] = ray.get([actor.__ray_call__.remote(lambda worker: os.getpid()) for actor in actors])
    return pids


def command_lines() -> str:
    """Command lines of every process, as `ps` shows them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_text(errors="replace"))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return "\n".join(found)


@pytest.mark.parametrize(
    "layout",
    [
        {"data_parallel_size": 2, "spares": 1},
        pytest.param(
            {"replicas": ["prefill:1", "decode:1"], "kv_transport": "nixl"},
            marks=pytest.mark.skipif(not importlib.util.find_spec("nixl_cu13"), reason="needs the extra nixl"),
        ),
    ],
    ids=["ranks and a spare", "nixl"],
)
def test_every_listener_has_the_nodes_address_and_no_key_is_seen(
    cluster: None, model: str, layout: dict[str, Any]
) -> None:
    in_driver, in_actor = listening(), hosts_of_a_plain_actor()
    pool = start_engines(EngineArgs(model=model, max_num_seqs=4, **layout), engine_factory=STUB)
    try:
        opened = listening() - in_driver
        assert {host for host, _ in opened} == {node_address()}
        assert len(opened) >= 2, "the supervisor, and the rendezvous of each replica"
        pids = worker_pids()
        assert len(pids) == 3 if "spares" in layout else 2
        for pid in pids:
            # NIXL, which trusts whoever connects, stays inside the machine when there is no other.
            assert set(hosts(pid) - in_actor) <= {node_address(), "127.0.0.1"}
        key, shown = pool._supervisor._liveness.key, command_lines()
        assert "ray::Worker" in shown
        assert key not in shown
        assert not RAY_TOKEN.exists() or RAY_TOKEN.read_text().strip() not in shown
        for pid in pids:
            assert key.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
        assert global_worker.node is not None
        logs = [path for path in Path(global_worker.node.get_session_dir_path()).rglob("*") if path.is_file()]
        assert logs
        assert [path for path in logs if key.encode() in path.read_bytes()] == []
    finally:
        pool.close()
