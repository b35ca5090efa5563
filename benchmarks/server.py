#!/usr/bin/env python3
"""What the HTTP layer of `shoal serve` adds, with engines that have no model: latencies, events per second, memory.

    PYTHONPATH=.src python benchmarks/server.py --output benchmarks/results/server.json

Server and client are processes of their own on one core each. A token's text is the time when the engines gave it away;
both processes read the same clock. Engines step in 16 groups in turn, as replicas do. Every stream is followed by
another one on its connection.
- ttft: from sending a request to its first event, without the time from its hand-over to the engines to their step.
- itl: how much longer the gap between two events is than between their tokens; negative ones count as 0.
- delay: from the engines to the client.
- bare: the same load on a server that only writes: what this machine's sockets and event loop allow.
- soak: the server's memory before and after many short requests, every fourth of which is left in the middle.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import itertools
import json
import os
import pstats
import random
import re
import shlex
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NUM_GROUPS = 16
NUM_TOKENS = 100
"""Tokens of an answer."""
BODIES = {
    "/v1/completions": {"prompt": [21, 22, 23], "stream": True, "max_tokens": NUM_TOKENS},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "What is 2 + 3?"}],
        "stream": True,
        "max_tokens": NUM_TOKENS,
    },
}
BARE = "bare"
_TIMES = re.compile(rb'"(?:text|content|reasoning_content)":"(?:(\d+) )?(\d+)"')


def serve(core: int, interval_s: float, profile: str | None) -> None:
    """Run a server until its input ends; prints its port first."""
    os.sched_setaffinity(0, {core})
    from shoal.cluster.openai.requests import RequestDefaults
    from shoal.cluster.server.http_server import HttpServer, freeze_objects, http_config
    from tests.support.served import bundled_defaults, make_served, stub_engines
    from tests.support.stub_client import StubClient

    handed_over_at: dict[str, int] = {}

    def times(is_first: bool, request_id: str) -> str:
        now = time.monotonic_ns()
        return f"{handed_over_at.pop(request_id)} {now}" if is_first else str(now)

    def make_client(defaults: RequestDefaults) -> StubClient:
        return StubClient(defaults.limits, interval_s=interval_s, num_groups=NUM_GROUPS, text=times)

    defaults = bundled_defaults()
    with stub_engines(defaults, make_client) as engines, socket.create_server(("127.0.0.1", 0), backlog=2048) as one:
        port = one.getsockname()[1]
        submit = engines[0].submit

        def note_and_submit(requests: Sequence[Any], deliver: Any) -> None:
            handed_over_at.update((request.request_id, time.monotonic_ns()) for request in requests)
            submit(requests, deliver)

        engines[0].submit = note_and_submit  # type: ignore[method-assign]

        async def run() -> None:
            served = make_served(*engines, defaults, port=port, has_log=False)
            server = HttpServer(http_config(served.app))
            freeze_objects()
            loop = asyncio.get_running_loop()
            stopped = loop.run_in_executor(None, sys.stdin.read)
            stopped.add_done_callback(lambda _: setattr(server, "should_exit", True))
            print(port, flush=True)
            await server.serve(sockets=[one])

        profiler = cProfile.Profile()
        if profile is None:
            asyncio.run(run())
        else:
            profiler.runcall(asyncio.run, run())
            pstats.Stats(profiler).dump_stats(profile)


class BareConnection(asyncio.Protocol):
    """Answers whatever comes with as many chunks as a stream of the server has, which its group's steps write."""

    def __init__(self, group: dict[BareConnection, int]) -> None:
        self._group = group

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._group[self] = NUM_TOKENS

    def connection_lost(self, error: Exception | None) -> None:
        self._group.pop(self, None)

    def write(self) -> None:
        left = self._group[self] = self._group[self] - 1
        self._transport.write(_chunk(b'data: {"text":"%d"}' % time.monotonic_ns()) + (b"" if left else _chunk(b"")))
        if not left:
            del self._group[self]


def _chunk(data: bytes) -> bytes:
    """As long as a usual event."""
    return b"%x\r\n%b\r\n" % (len(data.ljust(240)), data.ljust(240)) if data else b"0\r\n\r\n"


def serve_bare(core: int, interval_s: float) -> None:
    """Write chunks at the pace of the engines until the input ends; prints the port first."""
    os.sched_setaffinity(0, {core})
    groups: list[dict[BareConnection, int]] = [{} for _ in range(NUM_GROUPS)]
    turns = itertools.cycle(groups)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: BareConnection(next(turns)), "127.0.0.1", 0, backlog=2048)
        print(server.sockets[0].getsockname()[1], flush=True)
        stopped = loop.run_in_executor(None, sys.stdin.read)
        due = loop.time()
        for group in itertools.cycle(groups):
            due = max(due + interval_s / NUM_GROUPS, loop.time())
            await asyncio.sleep(due - loop.time())
            if stopped.done():
                return
            for connection in list(group):
                connection.write()

    asyncio.run(run())


@dataclass
class Server:
    """A server process."""

    process: subprocess.Popen[str]
    port: int

    @property
    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def memory_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return round(int(found[1]) / 1024, 1)


@contextmanager
def serving(args: argparse.Namespace, interval_s: float, *, is_bare: bool = False) -> Iterator[Server]:
    command = [sys.executable, __file__, "--serve", str(interval_s), "--server-core", str(args.server_core)]
    if is_bare:
        command.append("--serve-bare")
    if args.profile is not None:
        command += ["--profile", args.profile]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield Server(process, int(process.stdout.readline()))
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)


@dataclass
class Measured:
    """What clients saw since the measurement began."""

    is_on: bool = False
    num_events: int = 0
    ttft: list[float] = field(default_factory=list)
    itl: list[float] = field(default_factory=list)
    delay: list[float] = field(default_factory=list)


class Client(asyncio.Protocol):
    """One connection with one stream after the other."""

    def __init__(self, request: bytes, measured: Measured) -> None:
        self._request = request
        self._measured = measured

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._ask()

    def _ask(self) -> None:
        self._sent_at = time.monotonic_ns()
        self._last: tuple[int, int] | None = None
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        measured = self._measured
        if measured.is_on:
            measured.num_events += data.count(b"data: ")
        for submitted, given in _TIMES.findall(data):
            given_at = int(given)
            if measured.is_on:
                measured.delay.append((now - given_at) / 1e6)
                if submitted:
                    measured.ttft.append((now - given_at + int(submitted) - self._sent_at) / 1e6)
                if self._last is not None:
                    measured.itl.append(max(0.0, (now - self._last[0] - given_at + self._last[1]) / 1e6))
            self._last = now, given_at
        if data.endswith(b"0\r\n\r\n"):
            self._ask()


def request_for(path: str, **changes: Any) -> bytes:
    data = json.dumps(BODIES[path] | changes).encode()
    return b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (path.encode(), len(data), data)


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    if len(values) < 2:
        return None
    cuts = statistics.quantiles(values, n=1000)
    return {"p50": round(cuts[499], 3), "p99": round(cuts[989], 3), "p99.9": round(cuts[998], 3)}


async def stream(server: Server, request: bytes, num_streams: int, interval_s: float, seconds: float) -> dict[str, Any]:
    """Open the streams over the length of one, then measure."""
    measured = Measured()
    loop = asyncio.get_running_loop()
    clients = []
    opening_s = max(1.0, interval_s * NUM_TOKENS)
    begin = time.monotonic()
    for number in range(num_streams):
        await asyncio.sleep(begin + opening_s * number / num_streams - time.monotonic())
        clients.append(await loop.create_connection(lambda: Client(request, measured), "127.0.0.1", server.port))
    await asyncio.sleep(1.0)
    memory, cpu, own_cpu, begin = server.memory_mib, server.cpu_s, time.process_time(), time.monotonic()
    measured.is_on = True
    await asyncio.sleep(seconds / 2)
    memory_between = server.memory_mib
    await asyncio.sleep(seconds / 2)
    measured.is_on = False
    elapsed, used = time.monotonic() - begin, server.cpu_s - cpu
    result = {
        "streams": num_streams,
        "tokens_per_s_asked": round(num_streams / interval_s) if interval_s else None,
        "events_per_s": round(measured.num_events / elapsed),
        "server_cpu_us_per_event": round(1e6 * used / max(1, measured.num_events), 1),
        "server_core_busy": round(used / elapsed, 2),
        "client_core_busy": round((time.process_time() - own_cpu) / elapsed, 2),
        "ttft_ms": quantiles(measured.ttft),
        "itl_ms": quantiles(measured.itl),
        "delay_ms": quantiles(measured.delay),
        "memory_mib": [memory, memory_between, server.memory_mib],
    }
    for transport, _ in clients:
        transport.abort()
    return result


async def soak(server: Server, num_requests: int) -> dict[str, Any]:
    """Memory around short requests, by 50 at a time."""
    rng = random.Random(0)
    left = iter(range(num_requests))
    requests = [
        request_for("/v1/completions", max_tokens=4),
        request_for("/v1/completions", max_tokens=4, stream=False),
        request_for("/v1/completions", max_tokens=-1),
        request_for("/v1/chat/completions", max_tokens=4),
    ]

    async def ask() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for number in left:
            writer.write(rng.choice(requests))
            await reader.read(1)
            if number % 4 == 0:
                writer.transport.abort()
                reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
                continue
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            await (reader.readuntil(b"\r\n0\r\n\r\n") if length is None else reader.readexactly(int(length[1])))
        writer.transport.abort()

    memory = [server.memory_mib]
    steps = [num_requests // 10] * 10
    begin = time.monotonic()
    for step in steps:
        left = iter(range(step))
        await asyncio.gather(*[ask() for _ in range(50)])
        memory.append(server.memory_mib)
    rate = round(sum(steps) / (time.monotonic() - begin))
    return {"requests": sum(steps), "requests_per_s": rate, "memory_mib": memory}


def cpu_model() -> str:
    """As the kernel names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--loads",
        nargs="*",
        default=["200x5", "1000x5", "1000x0"],
        help="streams and the tokens/s of each; 0: as many as possible",
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--paths", nargs="*", choices=list(BODIES), default=list(BODIES))
    parser.add_argument("--soak", type=int, default=0, metavar="N", help="requests of the soak; 100000 takes minutes")
    parser.add_argument("--server-core", type=int, default=0)
    parser.add_argument("--client-core", type=int, default=1)
    parser.add_argument("--profile", metavar="FILE", help="of the server's event loop, by cProfile")
    parser.add_argument("--serve", type=float, metavar="INTERVAL", help=argparse.SUPPRESS)
    parser.add_argument("--serve-bare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.serve is not None:
        if args.serve_bare:
            serve_bare(args.server_core, args.serve)
        else:
            serve(args.server_core, args.serve, args.profile)
        return
    os.sched_setaffinity(0, {args.client_core})
    report: dict[str, Any] = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "python": sys.version.split()[0],
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load_before": [round(load, 2) for load in os.getloadavg()],
        "streams": {path: [] for path in [*args.paths, BARE]},
    }
    for path in [*args.paths, BARE]:
        for load in args.loads:
            num_streams, rate = map(int, load.split("x"))
            interval_s = 1 / rate if rate else 0.0
            request = request_for(args.paths[0] if path == BARE else path)
            with serving(args, interval_s, is_bare=path == BARE) as server:
                result = asyncio.run(stream(server, request, num_streams, interval_s, args.seconds))
            report["streams"][path].append(result)
            print(path, json.dumps(result), flush=True)
    if args.soak:
        with serving(args, 0.0) as server:
            report["soak"] = asyncio.run(soak(server, args.soak))
        print(json.dumps(report["soak"]))
    report["load_after"] = [round(load, 2) for load in os.getloadavg()]
    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
