from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]

from shoal.parallel.transport import Deadline, SocketMesh, connect_mesh
from tests.support.sockets import listening

HEADER = 16


def on_threads(size: int, work: Callable[[int], Any]) -> list[Any]:
    """`work(rank)` of every rank on a thread of its own; exceptions are results."""
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a rank hangs"
    return results


@pytest.fixture(params=["unix", "tcp"], autouse=True)
def wire(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Ranks that find themselves on one machine, and ranks that cannot know."""
    if request.param == "tcp":
        monkeypatch.setattr("shoal.parallel.transport._machine", lambda: "")
    return str(request.param)


def connect(
    store: Store,
    rank: int,
    size: int,
    timeout_s: float = 120.0,
    *,
    busy_wait_s: float = 0.0,
    hostname: str = "127.0.0.1",
    secret: bytes = b"",
) -> SocketMesh:
    return connect_mesh(
        store,
        rank,
        size,
        hostname=hostname,
        header_bytes=HEADER,
        deadline=Deadline(timeout_s),
        busy_wait_s=busy_wait_s,
        secret=secret,
    )


def swap(mesh: SocketMesh, payloads: dict[int, bytes], timeout_s: float = 120.0) -> dict[int, bytes]:
    """Send every peer its payload behind a header that says how long it is; what the peers sent."""
    received: dict[int, bytearray] = {}

    def on_header(peer: int, header: bytes) -> memoryview:
        received[peer] = bytearray(int.from_bytes(header, "little"))
        return memoryview(received[peer])

    messages = {peer: (len(data).to_bytes(HEADER, "little"), memoryview(data)) for peer, data in payloads.items()}
    mesh.finish(mesh.begin(messages, on_header), time.monotonic() + timeout_s)
    return {peer: bytes(data) for peer, data in received.items()}


def test_messages_of_any_size_cross_in_both_directions() -> None:
    store = HashStore()
    sizes = [0, 1, 100_000, 20_000_000]  # the last fills the buffers of both connections at once

    def work(rank: int) -> list[bool]:
        mesh = connect(store, rank, 3)
        same = []
        for size in sizes:
            got = swap(mesh, {peer: bytes([10 * rank + peer]) * (size + rank) for peer in range(3) if peer != rank})
            same.append(got == {p: bytes([10 * p + rank]) * (size + p) for p in range(3) if p != rank})
        return same

    assert on_threads(3, work) == [[True] * len(sizes)] * 3


def test_strangers_are_turned_away() -> None:
    store = HashStore()

    def work(rank: int) -> Any:
        if rank == 0:
            return swap(connect(store, 0, 2), {1: b"from 0"})
        address = json.loads(store.get("address/0"))
        for hello in (b"", b"GET / HTTP/1.1\r\n\r\n" + bytes(100), b"shoal-t1" + bytes(40)):
            with socket.create_connection((address["host"], address["port"])) as stranger, contextlib.suppress(OSError):
                stranger.sendall(hello)
                stranger.shutdown(socket.SHUT_WR)
        return swap(connect(store, 1, 2), {0: b"from 1"})

    assert on_threads(2, work) == [{1: b"from 1"}, {0: b"from 0"}]


def test_silent_strangers_hold_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.parallel.transport._HELLO_TIMEOUT_S", 1000.0)
    store = HashStore()

    def work(rank: int) -> Any:
        if rank == 0:
            return swap(connect(store, 0, 2), {1: b"from 0"})
        address = json.loads(store.get("address/0"))
        with contextlib.ExitStack() as crowd:
            for number in range(100):  # more than are kept
                if number % 2 and address["unix_name"]:
                    stranger = crowd.enter_context(socket.socket(socket.AF_UNIX))
                    stranger.connect("\0" + address["unix_name"])
                else:
                    stranger = crowd.enter_context(socket.create_connection((address["host"], address["port"])))
                stranger.sendall(b"shoal-t1"[: number % 8])
            return swap(connect(store, 1, 2), {0: b"from 1"})

    assert on_threads(2, work) == [{1: b"from 1"}, {0: b"from 0"}]


def test_a_stranger_is_turned_away_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.parallel.transport._HELLO_TIMEOUT_S", 0.05)
    store = HashStore()

    def work(rank: int) -> Any:
        if rank == 0:
            return swap(connect(store, 0, 2), {1: b"from 0"})
        address = json.loads(store.get("address/0"))
        with socket.create_connection((address["host"], address["port"])) as stranger:
            stranger.settimeout(10)
            assert stranger.recv(1) == b""
        return swap(connect(store, 1, 2), {0: b"from 1"})

    assert on_threads(2, work) == [{1: b"from 1"}, {0: b"from 0"}]


def test_what_the_store_tells_everybody_opens_nothing() -> None:
    store = HashStore()
    alone, _ = on_threads(2, lambda rank: connect(store, rank, 2, timeout_s=0.5, secret=b"ours" if rank == 0 else b""))
    assert "did not connect" in str(alone)


def test_a_rank_listens_on_its_own_address_and_only_while_it_waits() -> None:
    store = HashStore()
    before = listening()

    def work(rank: int) -> Any:
        if rank == 0:
            return connect(store, 0, 2, hostname="127.0.0.2")
        port = json.loads(store.get("address/0"))["port"]
        waiting = listening() - before
        connect(store, 1, 2, hostname="127.0.0.2")
        return waiting == {("127.0.0.2", port)}

    assert on_threads(2, work)[1] is True
    assert listening() == before


def test_ranks_of_one_machine_are_connected_by_unix_sockets(wire: str) -> None:
    store = HashStore()
    families = on_threads(2, lambda rank: connect(store, rank, 2)._sockets[1 - rank].family)
    assert families == [socket.AF_UNIX if wire == "unix" else socket.AF_INET] * 2


def test_busy_waiting_ends_in_sleep() -> None:
    store = HashStore()

    def work(rank: int) -> dict[int, bytes]:
        mesh = connect(store, rank, 2, busy_wait_s=0.01)
        time.sleep(0.1 * rank)  # rank 0 watches, then sleeps; rank 1 finds its message at once
        return swap(mesh, {1 - rank: bytes([rank])})

    assert on_threads(2, work) == [{1: b"\1"}, {0: b"\0"}]


def test_a_peer_that_does_not_come_is_a_timeout() -> None:
    with pytest.raises(TimeoutError, match="did not connect"):
        connect(HashStore(), 0, 2, timeout_s=0.2)


def test_silence_is_a_timeout_and_a_closed_peer_a_connection_error() -> None:
    store = HashStore()
    silent = threading.Event()

    def work(rank: int) -> Any:
        mesh = connect(store, rank, 2)
        if rank == 1:
            silent.wait(10)
            mesh.shut_down()
            return None
        with pytest.raises(TimeoutError):
            swap(mesh, {1: b"x"}, timeout_s=0.2)
        silent.set()
        with pytest.raises(ConnectionError):
            swap(mesh, {1: b"x"})
        return None

    assert on_threads(2, work) == [None, None]
