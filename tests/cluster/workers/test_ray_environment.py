"""What Ray takes from the environment: an address, a directory for sockets, a token, a module search path."""

from __future__ import annotations

import socket
import sys
import threading
from pathlib import Path

import pytest

from shoal.cluster.workers.ray_environment import (
    MAX_TEMP_DIR_BYTES,
    check_answers,
    choose_temp_dir,
    cluster_address,
    ensure_token,
    job_config,
)


@pytest.mark.parametrize(
    ("address", "env", "expected"),
    [
        (None, {}, None),
        (None, {"RAY_ADDRESS": ""}, None),
        (None, {"RAY_ADDRESS": " "}, None),
        (None, {"RAY_ADDRESS": "local"}, None),
        ("", {}, None),
        (None, {"RAY_ADDRESS": "auto"}, "auto"),
        (None, {"RAY_ADDRESS": "10.0.0.1:6379"}, "10.0.0.1:6379"),
        ("10.0.0.2:6379", {"RAY_ADDRESS": "10.0.0.1:6379"}, "10.0.0.2:6379"),
    ],
)
def test_an_empty_address_starts_ray_here(address: str | None, env: dict[str, str], expected: str | None) -> None:
    assert cluster_address(address, env) == expected


def listening_on(listener: socket.socket) -> str:
    return f"127.0.0.1:{listener.getsockname()[1]}"


def answering(listener: socket.socket, answer: bytes) -> threading.Thread:
    """A server that says one thing to one client."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return thread


def test_a_grpc_server_passes_for_a_cluster() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = answering(listener, bytes([0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 100]))
        check_answers(listening_on(listener))
        server.join()


def test_a_dead_address_says_what_to_set() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listening_on(listener)
    with pytest.raises(ValueError, match=rf"no Ray cluster answers at {address}: .*refused.*RAY_ADDRESS"):
        check_answers(address)


def test_another_server_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = answering(listener, b"HTTP/1.1 400 Bad Request\r\n\r\n")
        with pytest.raises(ValueError, match=r"no Ray cluster answers at .*: what listens there is not Ray; start one"):
            check_answers(listening_on(listener))
        server.join()


def test_a_silent_server_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(ValueError, match=r"timed out; start one"):
        check_answers(listening_on(listener), timeout_s=0.2)


@pytest.mark.parametrize("address", ["auto", "somewhere"])
def test_other_forms_of_an_address_are_left_to_ray(address: str) -> None:
    check_answers(address)


def test_an_address_of_the_ray_client_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ray://head:10001 is not supported: run this on a node of the cluster"):
        check_answers("ray://head:10001")


def test_a_long_tmpdir_is_passed_over(tmp_path: Path) -> None:
    long = tmp_path / ("j" * MAX_TEMP_DIR_BYTES)
    long.mkdir()
    assert choose_temp_dir({"TMPDIR": str(long)}, ["/nowhere", "/tmp"]) == "/tmp"
    assert choose_temp_dir({"TMPDIR": "/tmp"}, ["/var/tmp"]) == "/tmp"
    assert choose_temp_dir({"TMPDIR": ""}, ["/tmp"]) == "/tmp"


def test_without_a_short_directory_a_user_learns_what_to_set(tmp_path: Path) -> None:
    long = tmp_path / ("j" * MAX_TEMP_DIR_BYTES)
    long.mkdir()
    with pytest.raises(ValueError, match="set RAY_TMPDIR to a directory that can be written, with a path of at most"):
        choose_temp_dir({"TMPDIR": str(long)}, ["/nowhere"])
    with pytest.raises(ValueError, match=r"RAY_TMPDIR is '.*jjj' .*: set it to a directory"):
        choose_temp_dir({"RAY_TMPDIR": str(long)})


def test_the_longest_socket_fits() -> None:
    path = "/" + "t" * (MAX_TEMP_DIR_BYTES - 1) + "/ray/session_2026-11-30_23-59-59_999999_4194304/sockets/plasma_store"
    assert len(path) == 107


def test_a_home_that_cannot_be_written_gets_a_token_by_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    env: dict[str, str] = {}
    ensure_token(env)
    assert env == {}
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    ensure_token(env)
    assert len(env["RAY_AUTH_TOKEN"]) == 64
    given = {"RAY_AUTH_TOKEN": "mine"}
    ensure_token(given)
    assert given == {"RAY_AUTH_TOKEN": "mine"}


def test_workers_search_modules_where_the_driver_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the working directory, and not in this Python's installation, which a worker has of its own."""
    monkeypatch.chdir(tmp_path)
    config = job_config(["/here/first", "/here/second", f"{sys.prefix}/lib/python3/site-packages"])
    assert config._py_driver_sys_path == ["/here/second", "/here/first"]
    assert config._client_job
