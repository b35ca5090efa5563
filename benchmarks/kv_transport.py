#!/usr/bin/env python3
"""The transports of KV cache entries in turn, from one process to another of this machine: medians and ratios.

    python benchmarks/kv_transport.py --rounds 5 --output benchmarks/results/kv-transport.json

A round publishes all bytes in chunks and reads them as a decode replica does. "nixl, tcp" is what goes between nodes.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import ray
import torch

from shoal.cluster.environment import environment
from shoal.cluster.workers.ray_cluster import connect
from shoal.cluster.workers.ray_transport import RayTransport
from shoal.parallel.kv_transport import Fetch, KVChunk, KVTransport, checksum_of
from shoal.parallel.nixl_transport import NixlTransport
from shoal.runtime.kv_cache.transfer import MAX_FETCHES

TRANSPORTS: dict[str, dict[str, str]] = {"nixl": {}, "nixl, tcp": {"UCX_TLS": "^sm"}, "ray": {}}
"""Environment variables of a transport's processes, by name of the transport."""
BUFFER_BYTES = 256 << 20
TIMEOUT_S = 60.0


class Side:
    """One end of a transport, in a process of its own."""

    def __init__(self, name: str, transport: str) -> None:
        torch.set_num_threads(1)
        self._transport: KVTransport = (
            RayTransport(name)
            if transport == "ray"
            else NixlTransport(name, host="127.0.0.1", buffer_bytes=BUFFER_BYTES)
        )
        self._num_chunks = 0

    def publish(self, num_chunks: int, chunk_bytes: int) -> tuple[list[KVChunk], float]:
        """Chunks of random bytes, and the seconds that it took to publish them without their checksums."""
        chunks, seconds = [], 0.0
        for generation in range(self._num_chunks, self._num_chunks + num_chunks):
            payload = torch.randint(0, 256, (chunk_bytes,), dtype=torch.uint8)
            begin = time.perf_counter()
            address = self._transport.publish(payload, generation=generation)
            seconds += time.perf_counter() - begin
            chunks.append(
                KVChunk(
                    request_id="",
                    start=0,
                    end=chunk_bytes,
                    fingerprint=b"",
                    epoch=0,
                    generation=generation,
                    num_bytes=chunk_bytes,
                    checksum=checksum_of(payload, epoch=0, generation=generation, start=0, end=chunk_bytes),
                    address=address,
                )
            )
        self._num_chunks += num_chunks
        return chunks, seconds

    def release(self, chunks: list[KVChunk]) -> None:
        for chunk in chunks:
            self._transport.release(chunk.generation)

    def read(self, chunks: list[KVChunk]) -> tuple[float, float]:
        """Seconds until all chunks were here and checked, and those of the longest call of this thread.

        As many are read at a time as a decode replica reads.
        """
        begin, longest = time.perf_counter(), 0.0
        waiting, fetches = list(chunks), list[Fetch]()
        while waiting or fetches:
            start = time.perf_counter()
            if waiting and len(fetches) < MAX_FETCHES:
                fetches.append(self._transport.fetch(waiting.pop(0), timeout_s=TIMEOUT_S))
            elif fetches[0].poll() is not None:
                fetches.pop(0).close()
            else:
                time.sleep(0.0005)
                continue
            longest = max(longest, time.perf_counter() - start)
        return time.perf_counter() - begin, longest

    def read_chunk(self, generation: int) -> Any:
        """What RayTransport asks the publisher for."""
        assert isinstance(self._transport, RayTransport)
        return self._transport.read(generation)


class Pair:
    """A publisher and a reader."""

    def __init__(self, transport: str, variables: dict[str, str]) -> None:
        # More calls than one at a time: the object store asks for chunks while the publisher does something else.
        actor: Any = ray.remote(num_cpus=0, max_concurrency=MAX_FETCHES + 1)(Side)  # type: ignore[call-overload]
        self._source, self._reader = (
            actor.options(name=name, runtime_env={"env_vars": variables}).remote(name, transport)
            for name in (f"{transport} source", f"{transport} reader")
        )

    def round(self, num_chunks: int, chunk_bytes: int) -> dict[str, float]:
        """Seconds of one round."""
        chunks, publish = ray.get(self._source.publish.remote(num_chunks, chunk_bytes))
        read, longest = ray.get(self._reader.read.remote(chunks))
        ray.get(self._source.release.remote(chunks))
        return {"publish": publish, "read": read, "longest_call": longest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--chunk-mib", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    num_chunks, chunk_bytes = args.mib // args.chunk_mib, args.chunk_mib << 20
    cluster = connect(None, num_cpus=1)
    pairs = {name: Pair(name, variables) for name, variables in TRANSPORTS.items()}
    for pair in pairs.values():
        pair.round(num_chunks, chunk_bytes)  # connects, and touches memory for the first time
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in pairs}
    for number in range(args.rounds):
        for name, pair in pairs.items():
            rounds[name].append(pair.round(num_chunks, chunk_bytes))
            print(f"round {number + 1}: {name} {rounds[name][-1]['read']:.3f} s", file=sys.stderr, flush=True)
    cluster.close()
    medians = {
        name: {what: statistics.median(one[what] for one in own) for what in own[0]} for name, own in rounds.items()
    }
    report = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "bytes": num_chunks * chunk_bytes,
        "chunk_bytes": chunk_bytes,
        "rounds": args.rounds,
        "seconds": {
            name: {
                what: {"median": medians[name][what], "all": [round(one[what], 4) for one in rounds[name]]}
                for what in medians[name]
            }
            for name in pairs
        },
        "read_time_over_ray": {name: round(m["read"] / medians["ray"]["read"], 3) for name, m in medians.items()},
        "environment": environment(),
    }
    Path(args.output).write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["read_time_over_ray"]))


if __name__ == "__main__":
    main()
