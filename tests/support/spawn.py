"""Runs a function on several processes that share a store, with a deadline."""

from __future__ import annotations

import multiprocessing
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 600.0, may_die: tuple[int, ...] = ()
) -> list[Any]:
    """Call `fn(rank, store, *args)` in `world_size` fresh processes with one thread each; their results in rank order.

    `fn` is a module-level function, its arguments and result are plain values (no tensors). The TCPStore lives in this
    process. RuntimeError with the traceback of the first rank that raised, with the exit code of one that died (those
    in `may_die` may: their result is None), or with the ranks still running after `timeout_s`.
    """

    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    context = multiprocessing.get_context("spawn")
    processes, ends = [], {}
    for rank in range(world_size):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(fn, rank, port, args, there), daemon=True)
        process.start()
        there.close()
        processes.append(process)
        ends[here] = rank
    deadline = time.monotonic() + timeout_s
    results: list[Any] = [None] * world_size
    try:
        while ends:
            ready = wait(list(ends), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RuntimeError(f"ranks {sorted(ends.values())} still run after {timeout_s:g} s")
            for end in ready:
                assert isinstance(end, Connection)
                rank = ends.pop(end)
                results[rank] = _result(rank, end, processes[rank], rank in may_die)
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                raise RuntimeError(f"process {process.pid} returned its result but does not exit")
    finally:
        for process in processes:
            process.kill()
            process.join()
        del store
    return results


def barrier(store: Store, name: str, num_ranks: int, timeout_s: float = 600.0) -> None:
    """Wait until `num_ranks` ranks have come to the barrier of this name, which is used once."""
    if store.add(f"barrier/{name}", 1) == num_ranks:
        store.set(f"barrier/{name}/open", "")
    store.wait([f"barrier/{name}/open"], timedelta(seconds=timeout_s))


def _result(rank: int, end: Connection, process: multiprocessing.process.BaseProcess, may_die: bool) -> Any:
    try:
        result, error = end.recv()
    except EOFError:
        process.join(10)
        if may_die:
            return None
        raise RuntimeError(f"rank {rank} died with exit code {process.exitcode}") from None
    if error is not None:
        raise RuntimeError(f"rank {rank} raised\n{error}")
    return result


def _run(fn: Callable[..., Any], rank: int, port: int, args: tuple[Any, ...], end: Connection) -> None:
    torch.set_num_threads(1)
    try:
        store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=300))
        end.send((fn(rank, store, *args), None))
    except BaseException:  # pytest's own failures are no Exception
        end.send((None, traceback.format_exc()))
