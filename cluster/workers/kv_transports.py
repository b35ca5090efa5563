"""The choice of the transport that carries KV cache entries between replicas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shoal.parallel.kv_transport import KVTransport
from shoal.parallel.nixl_agent import INSTALL, is_installed, trial_failure
from shoal.parallel.nixl_transport import NixlTransport

from ..engine_args import EngineArgs
from .ray_cluster import node_address, nodes
from .ray_transport import RayTransport
from .spec import WorkerSpec


@dataclass(frozen=True, slots=True)
class TransportChoice:
    """The transport of a run and the reason for it."""

    name: Literal["nixl", "ray"]
    reason: str = ""
    """Why `auto` did not choose NIXL although it is installed."""

    def __str__(self) -> str:
        return f"KV cache entries travel through {self.name}" + (f" ({self.reason})" if self.reason else "")


def choose_transport(args: EngineArgs, num_nodes: int) -> TransportChoice:
    """Resolve `kv_transport` for this cluster; ValueError when NIXL was requested and cannot be used here.

    `auto` selects NIXL on a single node only, where it listens on the loopback address (see `nixl_transport`), and only
    if a trial in a separate process succeeds.
    """
    if args.kv_transport == "ray" or (args.kv_transport == "auto" and (num_nodes > 1 or not is_installed())):
        return TransportChoice("ray")
    if not is_installed():
        raise ValueError(f"kv_transport nixl needs the package nixl-cu13; {INSTALL}")
    failure = trial_failure()
    if failure is None:
        return TransportChoice("nixl")
    if args.kv_transport == "nixl":
        raise ValueError(f"kv_transport nixl: {failure}; give the node more shared memory, or set kv_transport to ray")
    return TransportChoice("ray", failure)


def create_transport(spec: WorkerSpec) -> KVTransport:
    """Create this rank's end of the chosen transport; ValueError when NIXL does not work on this node."""
    if spec.args.kv_transport == "ray":
        return RayTransport(spec.name)
    assert spec.args.kv_transport == "nixl", "the driver chooses"
    num_nodes = len(nodes())
    if num_nodes > 1 and (failure := trial_failure()) is not None:  # the driver has tried its own node only
        raise ValueError(f"kv_transport nixl: {failure}; set kv_transport to ray")
    host = "127.0.0.1" if num_nodes == 1 else node_address()  # the port has no authentication: expose it only if needed
    return NixlTransport(spec.name, host=host, buffer_bytes=spec.args.kv_buffer_size)
