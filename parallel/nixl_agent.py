"""Thin wrapper of NIXL: an agent that registers memory and reads that of other processes.

This module does not import torch, so that a separate process that tries the library starts quickly.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import importlib.util
import os
import shutil
import socket
import struct
import time
from typing import Any, Literal

from .kv_transport import TransferError
from .trial_run import trial_run

INSTALL = "install it with pip install 'shoal[nixl]', or set kv_transport to ray"
TRIAL_TIMEOUT_S = 60.0

_PROGRESS_INTERVAL_US = 10_000
"""Longest sleep of the progress thread."""
_ENVIRONMENT = {
    "UCX_TLS": "^posix",  # else each agent takes 2 MB of /dev/shm, and dies by SIGSEGV where it is full
    "UCX_TCP_CONN_NB": "y",  # else connecting to a dead node blocks every Python thread for minutes
    "UCX_DEBUG_SIGNO": "0",  # else SIGHUP stops the process until a debugger attaches
    "UCX_LOG_LEVEL": "fatal",  # errors are raised as TransferError instead
    "NIXL_LOG_LEVEL": "FATAL",
}
_SIOCGIFADDR = 0x8915

ReadState = Literal["running", "done", "failed"]


def is_installed() -> bool:
    """Whether the library is installed; does not load it."""
    return importlib.util.find_spec("nixl_cu13") is not None


@functools.cache
def trial_failure() -> str | None:
    """Why NIXL cannot be used on this node, in one sentence without a full stop; None if it can.

    The library is tried once per calling process, in a separate process: where it does not work, it may crash.
    """
    reason = trial_run("from shoal.parallel.nixl_agent import try_out; try_out()", timeout_s=TRIAL_TIMEOUT_S)
    if reason is None:
        return None
    free = shutil.disk_usage("/dev/shm").free >> 20 if os.path.isdir("/dev/shm") else 0
    return f"NIXL does not work on this node: {reason} when it was tried (/dev/shm has {free} MiB free)"


def try_out() -> None:
    """Read 4 KiB of one agent's memory with another agent, both in this process."""
    host = "127.0.0.1"
    num_bytes = 4096
    publisher = NixlAgent(f"shoal-trial-{os.getpid()}-0", host)
    reader = NixlAgent(f"shoal-trial-{os.getpid()}-1", host)
    source = ctypes.create_string_buffer(b"x" * num_bytes, num_bytes)
    target = ctypes.create_string_buffer(num_bytes)
    metadata = publisher.register(ctypes.addressof(source), num_bytes)
    reader.register(ctypes.addressof(target), num_bytes)
    name = reader.connect(metadata)
    handle = reader.prepare_read(name, ctypes.addressof(source), ctypes.addressof(target), num_bytes)
    state = reader.post(handle)
    while state == "running":
        time.sleep(1e-3)
        state = reader.state(handle)
    if state != "done" or target.raw != source.raw:
        raise TransferError("a read of 4 KiB within one process failed")
    reader.close([handle])
    publisher.close([])


class NixlAgent:
    """One NIXL agent with the UCX backend.

    Uses NIXL's bindings directly: with its Python class the progress thread never sleeps and occupies a core.
    """

    def __init__(self, name: str, host: str) -> None:
        for variable, value in {**_ENVIRONMENT, **_listen_on(host)}.items():
            os.environ.setdefault(variable, value)
        try:
            import nixl_cu13._bindings as nixl
        except ImportError as error:
            raise ValueError(f"kv_transport nixl cannot load nixl_cu13 ({error}); {INSTALL}") from error
        self._nixl: Any = nixl
        self._errors = tuple(e for e in vars(nixl).values() if isinstance(e, type) and issubclass(e, Exception))
        config = nixl.nixlAgentConfig()
        config.useProgThread = True
        config.pthrDelay = _PROGRESS_INTERVAL_US
        self._agent: Any = nixl.nixlAgent(name, config)
        try:
            self._backends = [self._agent.createBackend("UCX", {})]
        except self._errors as error:
            raise ValueError(f"kv_transport nixl does not work here: UCX does not start ({error})") from error

    def register(self, address: int, num_bytes: int) -> bytes:
        """Make host memory readable by other processes; returns the metadata that a reader needs."""
        nixl = self._nixl
        found = nixl.nixlRegDList(nixl.DRAM_SEG, [(address, num_bytes, 0, "")])
        try:
            self._agent.registerMem(found, self._backends)
        except self._errors as error:
            raise ValueError(f"kv_buffer_size: {num_bytes} bytes cannot be registered ({error})") from error
        metadata: bytes = self._agent.getLocalPartialMD(found, True, self._backends)
        return metadata

    def connect(self, metadata: bytes) -> str:
        """Add a process and its memory by their metadata; returns the process's name."""
        try:
            return str(self._agent.loadRemoteMD(metadata).decode())
        except self._errors as error:
            raise TransferError(f"a publisher cannot be reached ({error})") from error

    def disconnect(self, name: str) -> None:
        """Remove a process. Call only when no read from it is in progress."""
        self._agent.invalidateRemoteMD(name)

    def prepare_read(self, name: str, remote_address: int, address: int, num_bytes: int) -> int:
        """Prepare a read from a process's memory to `address`; returns a handle, which must be released."""
        nixl = self._nixl
        here = nixl.nixlXferDList(nixl.DRAM_SEG, [(address, num_bytes, 0)])
        there = nixl.nixlXferDList(nixl.DRAM_SEG, [(remote_address, num_bytes, 0)])
        try:
            handle: int = self._agent.createXferReq(nixl.NIXL_READ, here, there, name, "", self._backends)
        except self._errors as error:
            raise TransferError(f"{name} has no registered memory at the published address ({error})") from error
        return handle

    def post(self, handle: int) -> ReadState:
        """Start a read; "failed" if it fails at once, and nothing is in progress then."""
        try:
            self._agent.postXferReq(handle, "")
        except self._errors:
            return "failed"
        return "running"

    def state(self, handle: int) -> ReadState:
        """State of a read. Raises for other errors of NIXL, which do not prove that the read has ended."""
        nixl = self._nixl
        try:
            status = self._agent.getXferStatus(handle)
        except (nixl.nixlRemoteDisconnectError, nixl.nixlBackendError, nixl.nixlCancelledError):
            return "failed"
        return "done" if status == nixl.NIXL_SUCCESS else "running"

    def release(self, handle: int) -> None:
        """Release a read that has ended. (NIXL would also release a running one, which goes on writing.)"""
        self._agent.releaseXferReq(handle)

    def close(self, handles: list[int]) -> None:
        """Close the agent and these reads; nothing is transferred afterwards."""
        for handle in handles:
            self.release(handle)
        del self._agent


def _listen_on(host: str) -> dict[str, str]:
    """Environment that restricts UCX to the network interface of `host`; other devices, such as RDMA's, stay enabled.

    ValueError when no interface has this address.
    """
    addresses = {name: _address_of(name) for _, name in socket.if_nameindex()}
    if host not in addresses.values():
        raise ValueError(f"kv_transport nixl cannot listen on {host}: no network interface has this address")
    others = [name for name, address in addresses.items() if address != host]
    return {"UCX_NET_DEVICES": f"^{','.join(others)}"} if others else {}


def _address_of(interface: str) -> str | None:
    """IPv4 address of an interface; None if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            request = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()))
        except OSError:
            return None
    return socket.inet_ntoa(request[20:24])
