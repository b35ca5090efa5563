"""Transports in processes of their own, which are killed and frozen; some copy memory, as in a node, others use TCP."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from shoal.parallel.nixl_agent import is_installed
from shoal.parallel.nixl_transport import Memory, NixlTransport, Slice
from tests.parallel.nixl_process import DEADLINE_S, Process

needs_nixl = pytest.mark.skipif(not is_installed(), reason="nixl-cu13 is not installed")

MIB = 1 << 20
BUFFER_BYTES = 4 * MIB
TCP = {"UCX_TLS": "^sm"}
"""Not the memory of other processes: as between nodes."""


Start = Callable[..., Process]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    processes: list[Process] = []

    def one(name: str, *, buffer_bytes: int = BUFFER_BYTES, environment: dict[str, str] | None = None) -> Process:
        process = Process(name, tmp_path / f"{name}.txt", buffer_bytes, environment or {})
        processes.append(process)
        return process

    yield one
    for process in processes:
        process.remove()


@pytest.fixture(params=[{}, TCP], ids=["memory", "tcp"])
def environment(request: pytest.FixtureRequest) -> dict[str, str]:
    found: dict[str, str] = request.param
    return found


@needs_nixl
def test_many_chunks_of_any_size(start: Start, environment: dict[str, str]) -> None:
    source, reader = (start(name, environment=environment) for name in ("source", "reader"))
    sizes = [1, 63, 64, 4096, MIB + 1, 3 * MIB, 5 * MIB + 7]  # the last is larger than the buffer
    chunks = [source.publish(generation, size) for generation, size in enumerate(sizes)]
    for chunk in chunks:
        reader.fetch(chunk)
    assert [reader.wait(chunk.generation) for chunk in reversed(chunks)] == [True] * len(sizes)
    assert [reader.poll(chunk.generation) for chunk in chunks] == [True] * len(sizes), "valid until they are closed"
    for chunk in chunks:
        reader.close(chunk.generation)
        source.release(chunk.generation)
    assert reader.quarantined() == 0
    assert reader.read(source.publish(99, BUFFER_BYTES)) is True
    assert [p.end() for p in (reader, source)] == [0, 0]
    assert [p.output.read_text() for p in (reader, source)] == ["", ""]


@needs_nixl
def test_bytes_arrive_while_nobody_polls(start: Start) -> None:
    source, reader = (start(name, environment=TCP) for name in ("source", "reader"))
    reader.fetch(source.publish(1, 3 * MIB))
    assert reader.arrives_without_polls(1)


@needs_nixl
def test_what_was_released_cannot_be_read(start: Start) -> None:
    source, reader = start("source"), start("reader")
    gone, reused = source.publish(1, MIB), source.publish(2, MIB)
    source.release(1)
    source.release(1)
    assert "checksum" in reader.read(gone)
    source.release(2)
    assert source.publish(3, 2 * MIB).address == gone.address, "the room of both"
    assert "checksum" in reader.read(reused)


@needs_nixl
def test_what_was_not_announced_is_refused(start: Start) -> None:
    source, reader = start("source"), start("reader")
    chunk = source.publish(1, MIB)
    assert reader.read(chunk) is True
    assert "checksum" in reader.read(replace(chunk, checksum=chunk.checksum ^ 1))
    assert "checksum" in reader.read(replace(chunk, epoch=chunk.epoch + 1))
    assert "source has no registered memory" in reader.read(replace(chunk, num_bytes=BUFFER_BYTES + 1))
    for address in (b"", b"a name", bytes(100)):
        assert "cannot be reached" in reader.read(replace(chunk, address=address))
    assert reader.read(chunk) is True


@needs_nixl
def test_a_killed_publisher(start: Start, environment: dict[str, str]) -> None:
    """Before it was ever reached, between reads, and while it is read."""
    sources = [start(f"source {i}", environment=environment) for i in range(4)]
    reader = start("reader", environment=environment)
    chunks = [[source.publish(10 * i + j, MIB) for j in range(3)] for i, source in enumerate(sources)]
    sources[0].kill()
    assert isinstance(reader.read(chunks[0][0]), str)
    assert reader.read(chunks[1][0]) is True
    sources[1].kill()
    assert [isinstance(reader.read(chunk), str) for chunk in chunks[1]] == [True] * 3
    sources[2].freeze()
    for chunk in chunks[2]:
        reader.fetch(chunk)
    sources[2].kill()
    for chunk in chunks[2]:
        assert isinstance(reader.wait(chunk.generation), str)
        assert isinstance(reader.poll(chunk.generation), str)
        reader.close(chunk.generation)  # which forgets the publisher, but not before the last one
    assert reader.quarantined() == 0
    assert [reader.read(chunk) for chunk in chunks[3]] == [True] * 3
    assert reader.peers() == ["source 3"]
    assert reader.end() == 0
    assert reader.output.read_text() == ""


@needs_nixl
def test_a_killed_reader(start: Start) -> None:
    source, dying, reader = (start(name, environment=TCP) for name in ("source", "dying", "reader"))
    chunk = source.publish(1, 3 * MIB)
    dying.fetch(chunk)
    dying.kill()
    assert reader.read(chunk) is True
    assert reader.read(source.publish(2, MIB)) is True
    assert source.output.read_text() == ""


@needs_nixl
def test_memory_of_a_read_that_may_still_arrive_is_not_used_again(start: Start) -> None:
    frozen, other, reader = (start(name, environment=TCP) for name in ("frozen", "other", "reader"))
    chunk = frozen.publish(1, MIB)
    assert reader.read(chunk) is True  # so that only the bytes are missing later
    late = frozen.publish(2, MIB)
    frozen.freeze()
    reader.fetch(late, 0.2)
    place = reader.place_of(2)
    assert "in time" in reader.wait(2)
    reader.close(2)
    assert reader.quarantined() == MIB
    following = other.publish(3, 2 * MIB)
    reader.fetch(following)
    assert reader.wait(3) is True
    assert disjoint(place, reader.place_of(3))
    before = reader.bytes_at(place[0])
    assert before != 3, "the frozen process did not answer"
    frozen.thaw()
    deadline = time.monotonic() + DEADLINE_S
    while reader.bytes_at(place[0]) == before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert reader.bytes_at(place[0]) == 3, "it arrives after all"
    assert reader.poll(3) is True, "and not here"
    assert reader.read(other.publish(4, 64)) is True
    assert reader.quarantined() == 0
    assert reader.read(chunk) is True
    reader.fetch(other.publish(5, MIB))
    assert reader.place_of(5) == place


def disjoint(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] + one[1] <= other[0] or other[0] + other[1] <= one[0]


@needs_nixl
def test_quarantine_has_a_bound_and_ends_with_the_publisher(start: Start, environment: dict[str, str]) -> None:
    frozen, other, reader = (start(name, environment=environment) for name in ("frozen", "other", "reader"))
    chunks = [frozen.publish(i, MIB) for i in range(4)]
    frozen.freeze()  # before it was ever reached
    for chunk in chunks:
        reader.fetch(chunk)
        assert reader.poll(chunk.generation) is False
        reader.close(chunk.generation)
    assert reader.quarantined() == BUFFER_BYTES
    healthy = other.publish(9, MIB)
    assert "4194304 bytes are still pinned by cancelled reads" in reader.read(healthy)
    frozen.kill()
    deadline = time.monotonic() + DEADLINE_S
    while (outcome := reader.read(healthy)) is not True and time.monotonic() < deadline:
        time.sleep(0.01)
    assert outcome is True
    assert reader.quarantined() == 0
    assert reader.peers() == ["other"]


@needs_nixl
def test_a_process_that_takes_the_place_of_another(start: Start) -> None:
    source, reader = start("source"), start("reader")
    chunk = source.publish(1, MIB)
    assert reader.read(chunk) is True
    source.kill()
    following = start("source again")
    again = following.publish(1, MIB)
    assert isinstance(reader.read(chunk), str)
    assert reader.read(again) is True
    assert reader.peers() == ["source again"]


@needs_nixl
def test_publishers_that_nobody_reads_from_are_forgotten(start: Start) -> None:
    sources, reader = [start(f"source {i}") for i in range(2)], start("reader")
    chunks = [source.publish(1, MIB) for source in sources]
    assert reader.read(chunks[0]) is True
    reader.forget_idle_peers()
    assert reader.read(chunks[1]) is True
    assert reader.peers() == ["source 1"]
    assert reader.read(chunks[0]) is True


@needs_nixl
def test_closed_with_reads_under_way(start: Start) -> None:
    frozen, reader = start("frozen"), start("reader")
    chunks = [frozen.publish(i, MIB) for i in range(2)]
    frozen.freeze()
    for chunk in chunks:
        reader.fetch(chunk)
    reader.close(0)
    reader.close_transport()
    assert "cannot be read" in reader.poll(1)
    reader.close(1)
    assert reader.listeners() == set()
    assert reader.end() == 0
    assert reader.output.read_text() == ""


@needs_nixl
def test_it_listens_on_its_own_address_only(start: Start) -> None:
    source = start("source")
    assert source.listeners() == {"127.0.0.1"}
    assert not source.handles_hangup()


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot listen on 203\.0\.113\.7"):
        NixlTransport("a", host="203.0.113.7", buffer_bytes=MIB)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl_cu13", None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(ValueError, match=r"nixl_cu13 .*pip install 'shoal\[nixl\]'"):
        NixlTransport("a", host="127.0.0.1", buffer_bytes=MIB)


@given(st.lists(st.tuples(st.integers(1, 400), st.integers(0, 9)), max_size=30))
def test_slices_never_share_a_byte(steps: list[tuple[int, int]]) -> None:
    """Against a set of all bytes that have an owner; a step allocates, and frees an older slice if there is one."""
    memory = Memory(lambda tensor: b"", 1000)
    owned: list[tuple[Slice, set[int]]] = []
    for num_bytes, number in steps:
        new = memory.allocate(num_bytes)
        assert new.tensor.numel() == num_bytes
        assert new.start % 64 == 0
        places = set(range(new.address, new.address + num_bytes))
        assert all(places.isdisjoint(others) for _, others in owned)
        owned.append((new, places))
        if number < len(owned):
            memory.free(owned.pop(number)[0])
    for one, _ in owned:
        memory.free(one)
    assert all(region.free == [(0, region.tensor.numel())] for region in memory.regions)
