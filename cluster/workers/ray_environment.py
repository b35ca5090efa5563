"""What Ray reads from the environment of the process that starts it, made safe before Ray does.

Ray puts the working directory first on its workers' module search path, keeps its sockets below TMPDIR however long
that is, writes a token into the home directory, and waits for an address at which nothing answers.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

from ray.job_config import JobConfig

ANSWER_TIMEOUT_S = 10.0
MAX_SOCKET_PATH_BYTES = 107
"""Linux' limit for the path of a Unix socket."""

_LONGEST_SOCKET = "/ray/session_2026-11-30_03-56-55_123456_4194304/sockets/plasma_store"
MAX_TEMP_DIR_BYTES = MAX_SOCKET_PATH_BYTES - len(_LONGEST_SOCKET)
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What a client opens with: the preface and an empty SETTINGS frame; a server answers with a SETTINGS frame."""
_HTTP2_FRAME_HEADER_BYTES = 9
_HTTP2_SETTINGS = b"\x04"
_USUAL_TEMP_DIRS = ("/tmp", "/var/tmp", "/dev/shm")


def cluster_address(address: str | None, env: Mapping[str, str]) -> str | None:
    """The cluster to connect to: `address`, else RAY_ADDRESS; None (also for an empty one) to start Ray here."""
    wanted = (address or env.get("RAY_ADDRESS", "")).strip()
    return None if wanted in ("", "local") else wanted


def check_answers(address: str, *, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
    """ValueError unless a gRPC server, which Ray's control store is, answers at `address` (host:port, or auto)."""
    if "://" in address:
        raise ValueError(
            f"the Ray address {address} is not supported: run this on a node of the cluster, and give host:port or auto"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "1":
                connection.sendall(_HTTP2_PREFACE)
                answer = connection.recv(_HTTP2_FRAME_HEADER_BYTES)
                if answer[3:4] != _HTTP2_SETTINGS:
                    raise OSError("what listens there is not Ray")
    except (OSError, OverflowError) as error:
        raise ValueError(no_cluster(address, str(error))) from error


def no_cluster(address: str, reason: str) -> str:
    """The message for an address where there is no Ray."""
    return (
        f"no Ray cluster answers at {address}: {reason}; start one there with `ray start --head`, correct ray_address "
        "or RAY_ADDRESS, or set neither to start Ray on this machine"
    )


def choose_temp_dir(env: Mapping[str, str], usual: Sequence[str] = _USUAL_TEMP_DIRS) -> str:
    """The directory below which Ray keeps its session: RAY_TMPDIR, else TMPDIR, else a usual one.

    It must be writable, and short enough for the paths of Ray's sockets. ValueError when RAY_TMPDIR is not, or when
    there is no such directory.
    """
    limit = f"a directory that can be written, with a path of at most {MAX_TEMP_DIR_BYTES} bytes"
    if chosen := env.get("RAY_TMPDIR"):
        if not _suits(chosen):
            raise ValueError(f"RAY_TMPDIR is {chosen!r} ({len(os.fsencode(chosen))} bytes): set it to {limit}")
        return chosen
    candidates = [*([env["TMPDIR"]] if env.get("TMPDIR") else []), *usual]
    for candidate in candidates:
        if _suits(candidate):
            return candidate
    raise ValueError(f"Ray finds no place for its sockets in {', '.join(candidates)}: set RAY_TMPDIR to {limit}")


def _suits(directory: str) -> bool:
    path = os.path.abspath(directory)
    return len(os.fsencode(path)) <= MAX_TEMP_DIR_BYTES and os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)


def ensure_token(env: MutableMapping[str, str]) -> None:
    """Give Ray a token by environment where it would write one into a home directory that cannot be written."""
    if env.get("RAY_AUTH_TOKEN") or env.get("RAY_AUTH_TOKEN_PATH"):
        return
    try:
        token = Path.home() / ".ray" / "auth_token"
        token.parent.mkdir(parents=True, exist_ok=True)
        usable = os.access(token, os.R_OK) if token.exists() else os.access(token.parent, os.W_OK)
    except (OSError, RuntimeError):  # RuntimeError: there is no home directory
        usable = False
    if not usable:
        env["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def job_config(search_path: Sequence[str] | None = None) -> JobConfig:
    """A job whose workers search modules where this process does, and not in the working directory besides.

    Directories of this Python's installation are left out: a worker on another node has those of its own.
    """
    installed = tuple({str(Path(prefix).resolve()) + os.sep for prefix in (sys.prefix, sys.base_prefix)})
    entries = [os.path.abspath(entry) for entry in (sys.path if search_path is None else search_path)]
    own = [entry for entry in entries if not (os.path.realpath(entry) + os.sep).startswith(installed)]
    # The job of a Ray client is the one to which Ray adds no working directory. Workers insert entry by entry in front.
    return JobConfig(_client_job=True, _py_driver_sys_path=own[::-1])
