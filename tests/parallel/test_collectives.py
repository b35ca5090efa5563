from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from shoal.parallel.collectives import CollectiveError, Communicator
from shoal.parallel.config import ParallelConfig
from shoal.parallel.diagnosis import HEADER_BYTES
from shoal.parallel.groups import init_groups
from shoal.parallel.transport import SocketMesh
from tests.support.spawn import barrier, run_ranks

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8]
SHAPES = [(3,), (2, 3), (2, 3, 4), (0, 3), (3, 0), (4096 // 4 + 1, 2)]


def world(rank: int, store: Store, size: int, epoch: int, timeout_s: float = 120.0) -> Communicator:
    comm = init_groups(ParallelConfig(data_parallel_size=size), rank, store, epoch=epoch, timeout_s=timeout_s).world
    comm.step = 5
    return comm


def block(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What `rank` contributes: known to every rank."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, 200, shape, generator=generator).to(dtype)


def values_that_differ(rank: int, store: Store, size: int) -> list[str]:
    """Collectives whose result is not the expected one, in a group of `size` ranks; the number of cases comes last."""
    comm = world(rank, store, size, epoch=size)
    wrong, count = [], 0

    def check(name: str, ok: bool) -> None:
        nonlocal count
        count += 1
        if not ok:
            wrong.append(name)

    for dtype in DTYPES:
        for shape in SHAPES:
            for dim in range(-len(shape), len(shape)):
                got = comm.all_gather(block(rank, shape, dtype), dim=dim, layer=1, op="gather")
                expected = torch.cat([block(r, shape, dtype) for r in range(size)], dim)
                check(f"all_gather {dtype} {shape} {dim}", got.dtype == dtype and torch.equal(got, expected))
    transposed = block(rank, (3, 4), torch.float32).t()
    expected = torch.cat([block(r, (3, 4), torch.float32).t() for r in range(size)])
    check("not contiguous", torch.equal(comm.all_gather(transposed, dim=0, layer=1, op="gather"), expected))

    # Rank s sends table[s][d] rows to rank d; row i of a pair is (s, d, i). Some are zero, one is above a frame.
    table = [[(3 * s + d) % 4 for d in range(4)] for s in range(4)]
    table[1][0] = 2000
    for dtype in (torch.float32, torch.bfloat16):

        def rows(source: int, dest: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            n = table[source][dest]
            return torch.tensor([[source, dest, i % 100] for i in range(n)], dtype=dtype).reshape(n, 3)

        x = torch.cat([rows(rank, d) for d in range(size)])
        send, recv = table[rank][:size], [table[s][rank] for s in range(size)]
        got = comm.all_to_all(x, send, recv, layer=1, op="rows")()
        check(f"all_to_all {dtype}", torch.equal(got, torch.cat([rows(s, rank) for s in range(size)])))
    nothing = comm.all_to_all(torch.empty(0, 3), [0] * size, [0] * size, layer=1, op="rows")()
    check("all_to_all of nothing", nothing.shape == (0, 3))

    def segment(source: int, dest: int) -> torch.Tensor:
        return torch.full(((source * 4 + dest) * 700,), 16 * source + dest, dtype=torch.uint8)

    segments = comm.all_to_all_bytes([segment(rank, d) for d in range(size)], layer=1, op="segments")
    check("all_to_all_bytes", all(torch.equal(t, segment(s, rank)) for s, t in enumerate(segments)))

    ints = comm.all_gather_ints([rank, -1 - rank, 2**62] * (rank * 100), layer=-1, op="sizes")
    check("all_gather_ints", ints == [[r, -1 - r, 2**62] * (r * 100) for r in range(size)])
    for num_bytes in (0, 5, 100_000):
        data = bytes(range(256)) * (num_bytes // 256) + bytes(num_bytes % 256)
        for root in range(size):
            got_bytes = comm.broadcast_bytes(data if rank == root else None, num_bytes, root, layer=-1, op="batch")
            check(f"broadcast {num_bytes} from {root}", got_bytes == data)
    return [*wrong, str(count)]


def failure_of(collective: Callable[[], object]) -> tuple[str, str]:
    """(type, message) of the CollectiveError that `collective` raises."""
    with pytest.raises(CollectiveError) as error:
        collective()
    return error.type.__name__, str(error.value)


def failures(rank: int, store: Store) -> dict[str, Any]:
    """One group for each way to fail; every group is formed by processes that have just left a failed one."""
    found: dict[str, Any] = {}
    x = torch.zeros(4, 2)
    if rank < 2:
        comm = world(rank, store, 2, epoch=10)
        if rank == 0:
            found["other op"] = failure_of(lambda: comm.all_gather(x, dim=0, layer=3, op="o_proj"))
            found["after a failure"] = failure_of(lambda: comm.all_gather(x, dim=0, layer=4, op="next"))
        else:
            found["other op"] = failure_of(lambda: comm.all_to_all(x, [3, 1], [2, 2], layer=2, op="combine")())

        for epoch, size in ((11, 10), (12, 5000)):
            comm = world(rank, store, 2, epoch=epoch)
            y = torch.zeros(size * (rank + 1))
            found[f"size {size}"] = failure_of(lambda c=comm, y=y: c.all_gather(y, dim=0, layer=0, op="g"))  # type: ignore[misc]
        comm = world(rank, store, 2, epoch=13)
        recv = [4, 3] if rank == 0 else [3, 4]
        found["counts"] = failure_of(lambda: comm.all_to_all(torch.zeros(8, 9), [4, 4], recv, layer=0, op="rows")())

        comm = world(rank, store, 2, epoch=14)
        comm.step = 5 + rank
        found["step"] = failure_of(lambda: comm.all_gather_ints([1], layer=-1, op="agree"))

        comm = world(rank, store, 2, epoch=15)
        if rank == 0:
            found["broadcast"] = failure_of(lambda: comm.broadcast_bytes(b"abc", 3, 0, layer=-1, op="batch"))
        else:
            found["broadcast"] = failure_of(lambda: comm.all_gather(x, dim=0, layer=0, op="embed"))

        comm = world(rank, store, 2, epoch=16)
        if rank == 0:
            threading.Timer(0.2, comm.abort, ["rank 1 lost its lease"]).start()
            found["abort"] = failure_of(lambda: comm.all_gather(x, dim=0, layer=1, op="a"))
        barrier(store, "aborted", 2)
        comm = world(rank, store, 2, epoch=17)
        if rank == 0:
            time.sleep(0.2)
            comm.abort("shutting down")
        else:
            found["abort"] = failure_of(lambda: comm.all_gather(x, dim=0, layer=1, op="a"))

    barrier(store, "pairs are done", 4)
    if rank < 3:
        comm = world(rank, store, 3, epoch=20)
        comm.all_gather(x, dim=0, layer=1, op="first")
        comm.timeout_s = 0.7
        if rank < 2:
            found["missing"] = failure_of(lambda: comm.all_gather(x, dim=0, layer=2, op="second"))
        barrier(store, "two ranks left", 3)
        if rank == 2:
            # What the others sent before they left is complete, so only the next collective can tell.
            late = ("second", "third")
            found["late"] = failure_of(lambda: [comm.all_gather(x, dim=0, layer=2, op=op) for op in late])
    return found


def every_check(rank: int, store: Store) -> dict[str, Any]:
    """Rank 3 is killed in the last check; what it computed before is checked by the others' results."""
    results: dict[str, Any] = {f"world {n}": values_that_differ(rank, store, n) for n in (4, 3, 2) if rank < n}
    results |= failures(rank, store)
    barrier(store, "failures are done", 4)
    comm = world(rank, store, 4, epoch=30)
    comm.all_gather(torch.zeros(1), dim=0, layer=0, op="before")
    if rank == 3:
        assert results["world 4"][:-1] == []
        os.kill(os.getpid(), signal.SIGKILL)
    results["killed"] = failure_of(lambda: comm.all_gather(torch.zeros(1), dim=0, layer=1, op="attention"))
    barrier(store, "survivors", 3)
    survivors = world(rank, store, 3, epoch=31)
    results["survivors"] = survivors.all_gather_ints([rank], layer=-1, op="again")
    return results


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(every_check, 4, timeout_s=600, may_die=(3,))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_collective_gives_the_ranks_values(results: list[dict[str, Any]], size: int) -> None:
    num_cases = 5 * 2 * (1 + 2 + 3 + 2 + 2 + 2) + 1 + 2 + 1 + 1 + 1 + 3 * size
    assert [results[rank][f"world {size}"] for rank in range(min(size, 3))] == [[str(num_cases)]] * min(size, 3)


def test_different_collectives_name_both_sides(results: list[dict[str, Any]]) -> None:
    gather = "all_gather 'o_proj' (epoch 10, step 5, layer 3, float32)"
    combine = "all_to_all 'combine' (epoch 10, step 5, layer 2, float32)"
    kind, message = results[0]["other op"]
    assert kind == "CollectiveMismatch"
    assert message == (
        f"rank 0 of 2 in group 'world' is in {gather}, sends 32 bytes to rank 1 and expects 32 bytes from it;"
        f" rank 1 is in {combine} and sends 24 bytes here"
    )
    kind, message = results[1]["other op"]
    assert kind == "CollectiveMismatch"
    assert message == (
        f"rank 1 of 2 in group 'world' is in {combine}, sends 24 bytes to rank 0 and expects 16 bytes from it;"
        f" rank 0 is in {gather} and sends 32 bytes here"
    )


def test_a_failed_group_refuses_the_next_collective(results: list[dict[str, Any]]) -> None:
    kind, message = results[0]["after a failure"]
    assert kind == "CollectiveError"
    assert (
        "cannot run all_gather 'next' (epoch 10, step 5, layer 4, float32): the group ended before: rank 0" in message
    )


@pytest.mark.parametrize(
    ("case", "sent", "expected"),
    [
        ("size 10", (40, 80), (40, 80)),
        ("size 5000", (20000, 40000), (20000, 40000)),
        ("counts", (144, 144), (108, 108)),
    ],
)
def test_different_sizes_are_a_mismatch(
    results: list[dict[str, Any]], case: str, sent: tuple[int, int], expected: tuple[int, int]
) -> None:
    for rank in (0, 1):
        kind, message = results[rank][case]
        assert kind == "CollectiveMismatch"
        assert f"sends {sent[rank]} bytes to rank {1 - rank} and expects {expected[rank]} bytes" in message
        assert message.endswith(f"sends {sent[1 - rank]} bytes here")


def test_different_steps_are_a_mismatch(results: list[dict[str, Any]]) -> None:
    kind, message = results[0]["step"]
    assert kind == "CollectiveMismatch"
    assert "is in all_gather_ints 'agree' (epoch 14, step 5, layer -1, int64)" in message
    assert "rank 1 is in all_gather_ints 'agree' (epoch 14, step 6, layer -1, int64)" in message


def test_broadcast_against_all_gather_is_a_mismatch(results: list[dict[str, Any]]) -> None:
    for rank in (0, 1):
        kind, message = results[rank]["broadcast"]
        assert kind == "CollectiveMismatch"
        assert "broadcast_bytes from rank 0 'batch' (epoch 15, step 5, layer -1, uint8)" in message
        assert "all_gather 'embed' (epoch 15, step 5, layer 0, float32)" in message


def test_abort_frees_the_rank_that_waits_and_its_peer(results: list[dict[str, Any]]) -> None:
    kind, message = results[0]["abort"]
    assert kind == "CollectiveError"
    assert message == (
        "rank 0 of 2 in group 'world' left all_gather 'a' (epoch 16, step 5, layer 1, float32): rank 1 lost its lease"
    )
    kind, message = results[1]["abort"]
    assert kind == "CollectiveError"
    assert "rank 1 of 2 in group 'world' lost a connection in all_gather 'a'" in message


def test_a_missing_rank_is_named_when_the_deadline_passes(results: list[dict[str, Any]]) -> None:
    kinds = {results[rank]["missing"][0] for rank in (0, 1)}
    assert "CollectiveTimeout" in kinds  # the rank whose deadline is later may see the other one's connection close
    second = "all_gather 'second' (epoch 20, step 5, layer 2, float32)"
    for rank in (0, 1):
        kind, message = results[rank]["missing"]
        what = "waited 0.7 s" if kind == "CollectiveTimeout" else "lost a connection"
        assert message.startswith(f"rank {rank} of 3 in group 'world' {what} in {second}; sends [32, 32, 32] bytes")
        assert "expects [32, 32, 32] bytes" in message
        assert f"rank {1 - rank} entered it" in message
        missing = "rank 2 did not send here, last heard in all_gather 'first' (epoch 20, step 5, layer 1, float32)"
        assert f"{missing} and reports" in message
    kind, message = results[2]["late"]
    assert kind == "CollectiveError"
    assert re.search(r"rank 0 .*reports: <rank 0 of 3 in group 'world' (waited|lost).* in all_gather 'second'", message)


def test_a_killed_rank_is_named_and_the_survivors_form_a_new_group(results: list[dict[str, Any]]) -> None:
    messages = []
    for rank in range(3):
        kind, message = results[rank]["killed"]
        assert kind == "CollectiveError"
        assert message.startswith(
            f"rank {rank} of 4 in group 'world' lost a connection in all_gather 'attention' "
            "(epoch 30, step 5, layer 1, float32)"
        )
        messages.append(message)
        assert results[rank]["survivors"] == [[0], [1], [2]]
    named = "rank 3 did not send here, last heard in all_gather 'before' (epoch 30, step 5, layer 0, float32)"
    assert any(f"{named} and reports nothing" in message for message in messages)


def test_a_group_of_one_needs_no_process_group() -> None:
    comm = Communicator()
    x = torch.arange(6.0).view(2, 3)
    assert comm.all_gather(x, dim=1, layer=0, op="a") is x
    assert comm.all_to_all(x, [2], [2], layer=0, op="a")() is x
    assert comm.all_gather_ints([1, 2], layer=0, op="a") == [[1, 2]]
    assert comm.broadcast_bytes(b"xy", 2, 0, layer=0, op="a") == b"xy"
    comm.abort("unused")


class CompleteWork:
    """Work of NCCL that is complete: it ran to its end, or it was aborted."""

    def is_completed(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class CompleteNccl:
    """Runs `during` in place of a transfer, and calls the transfer complete although it received nothing."""

    def __init__(self, during: Callable[[], None]) -> None:
        self._during = during

    def alltoall(self, _outputs: list[torch.Tensor], _inputs: list[torch.Tensor], /) -> Any:
        self._during()
        return CompleteWork()

    def abort(self) -> None:
        pass


def gather_over(comm: Communicator, connection: socket.socket, during: Callable[[], None]) -> torch.Tensor:
    mesh = SocketMesh({1 - comm.rank: connection}, HEADER_BYTES)
    comm.connect(0, mesh, CompleteNccl(during))
    return comm.all_gather(torch.ones(4), dim=0, layer=-1, op="logits")


def test_an_aborted_collective_that_looks_complete_is_an_error() -> None:
    """What it received is garbage: with no collective after it, nothing else would tell."""
    one, other = Communicator(0, 2), Communicator(1, 2)
    here, there = socket.socketpair()
    peer = threading.Thread(target=gather_over, args=(other, there, lambda: None))
    peer.start()
    with pytest.raises(CollectiveError, match=r"left all_gather 'logits' .*: a rank was lost"):
        gather_over(one, here, lambda: one.abort("a rank was lost"))
    peer.join()
