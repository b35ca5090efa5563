"""Which sockets a process listens on, from /proc."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

LISTEN = "0A"


def listening(pid: int | None = None) -> set[tuple[str, int]]:
    """(address, port) of every TCP socket that a process, by default this one, listens on."""
    process = Path(f"/proc/{os.getpid() if pid is None else pid}")
    inodes = {target[8:-1] for fd in (process / "fd").iterdir() if (target := _target(fd)).startswith("socket:[")}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in (process / "net" / table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and fields[9] in inodes:
                host, port = fields[1].split(":")
                found.add((_address(host), int(port, 16)))
    return found


def _target(fd: Path) -> str:
    try:
        return os.readlink(fd)
    except FileNotFoundError:  # closed meanwhile
        return ""


def _address(text: str) -> str:
    """The kernel writes words of 32 bits in the machine's byte order."""
    words = [int(text[i : i + 8], 16) for i in range(0, len(text), 8)]
    family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    return socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words))
