"""Which transport carries cache records between replicas."""

from __future__ import annotations

from typing import Literal

from shoal.parallel.kv_transport import KVTransport
from shoal.parallel.nixl_transport import INSTALL, NixlTransport, is_installed

from ..engine_args import EngineArgs
from .ray_cluster import node_address, nodes
from .ray_transport import RayTransport
from .spec import WorkerSpec


def choose_transport(args: EngineArgs, num_nodes: int) -> Literal["nixl", "ray"]:
    """What `kv_transport` stands for on this cluster; ValueError when it is not installed.

    By itself nixl is only taken on one node, where it listens for that node alone: see `nixl_transport`.
    """
    if args.kv_transport == "nixl" and not is_installed():
        raise ValueError(f"kv_transport nixl needs the package nixl-cu13; {INSTALL}")
    if args.kv_transport == "auto":
        return "nixl" if num_nodes == 1 and is_installed() else "ray"
    return args.kv_transport


def create_transport(spec: WorkerSpec) -> KVTransport:
    """This rank's end of the transport that was chosen."""
    if spec.args.kv_transport == "ray":
        return RayTransport(spec.name)
    assert spec.args.kv_transport == "nixl", "the driver chooses"
    host = "127.0.0.1" if len(nodes()) == 1 else node_address()  # nobody outside need reach a port that trusts all
    return NixlTransport(spec.name, host=host, buffer_bytes=spec.args.kv_buffer_size)
