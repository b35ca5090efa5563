"""`shoal serve` as a process, through sockets."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import httpx
import pytest

from shoal.cluster.bundled import BUNDLED_MODEL
from shoal.cluster.engine_args import EngineArgs
from shoal.cluster.report import EnginesFailed
from shoal.cluster.server.serve import serve
from shoal.cluster.server.settings import ServeArgs

DEADLINE_S = 300.0
CHAT = {
    "messages": [{"role": "user", "content": "What is 4821 + 7790?"}],
    "chat_template_kwargs": {"thinking": True},
    "temperature": 0,
    "max_tokens": 100,
}


class Server:
    """A running server."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url
        self.lines: list[str] = []
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines += self.process.stderr

    def wait_ready(self) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while httpx.get(f"{self.url}/health", timeout=DEADLINE_S).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.end()

    def end(self) -> int:
        status = self.process.wait(DEADLINE_S)
        self._reading.join(DEADLINE_S)
        return status


@contextmanager
def serving(*options: str) -> Iterator[Server]:
    command = [sys.executable, "-m", "shoal", "serve", "--model", str(BUNDLED_MODEL), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--num-threads-per-worker", "1", *options],
        stdout=subprocess.DEVNULL,  # the log of requests
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
    try:
        assert process.stderr is not None
        first = process.stderr.readline()
        found = re.search(r"listening on (http://\S+:\d+)", first)
        assert found, first
        yield Server(process, found[1])
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_it_answers_streams_and_drains() -> None:
    with serving("--served-model-name", "tiny") as server:
        assert httpx.get(f"{server.url}/live", timeout=DEADLINE_S).status_code == 200
        server.wait_ready()
        (card,) = httpx.get(f"{server.url}/v1/models", timeout=DEADLINE_S).json()["data"]
        assert (card["id"], card["root"]) == ("tiny", str(BUNDLED_MODEL))
        body = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, timeout=DEADLINE_S).json()
        assert body["choices"][0]["message"]["content"] == "12611"
        asked = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=asked, timeout=DEADLINE_S) as response:
            lines = response.iter_lines()
            first = next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        events = [json.loads(line.removeprefix("data: ")) for line in [first, *rest[:-1]]]
        assert rest[-1] == "data: [DONE]"
        assert events[-1]["choices"][0]["finish_reason"] == "length", "what runs at the signal is finished"
        assert server.end() == 0
    assert any(line.startswith("stopping: waiting up to 60 s for 1 requests") for line in server.lines)


@pytest.mark.slow
def test_a_second_signal_ends_what_runs_with_an_error_event() -> None:
    with serving() as server:
        server.wait_ready()
        asked = {"prompt": "a", "max_tokens": 1500, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=asked, timeout=DEADLINE_S) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + DEADLINE_S
            while httpx.get(f"{server.url}/health", timeout=DEADLINE_S).json()["status"] != "draining":
                assert time.monotonic() < deadline
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        error = json.loads(rest[-2].removeprefix("data: "))["error"]
        assert error["code"] == "engine_failed"
        assert "the engines were closed" in error["message"]
        assert server.end() == 0


@pytest.mark.slow
def test_a_client_that_leaves_frees_its_request() -> None:
    """Its 1500 tokens would hold the only place of a second request for a long time."""
    with serving("--max-num-seqs", "1") as server:
        server.wait_ready()
        asked = {"prompt": "a", "max_tokens": 1900, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=asked, timeout=DEADLINE_S) as response:
            next(response.iter_lines())
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:  # one that is not streamed
            data = json.dumps({**asked, "stream": False}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
            connection.sendall(head.encode() + data)
            time.sleep(0.2)
        answer = httpx.post(
            f"{server.url}/v1/completions", json={"prompt": "b", "max_tokens": 2}, timeout=DEADLINE_S
        ).json()
        assert answer["usage"]["completion_tokens"] == 2
        assert server.stop() == 0
        (line,) = [line for line in server.lines if line.startswith("stopping")]
        assert line.strip() == "stopping: waiting up to 60 s for 0 requests"


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "shoal", "serve", "--model", str(BUNDLED_MODEL), "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: cannot listen on 127.0.0.1:{port}: Address already in use; choose another host or port\n"
    )


@pytest.mark.slow
def test_a_certificate_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shoal", "serve", "--model", str(BUNDLED_MODEL), "--port", "0"]
    for path in (tmp_path / "missing.pem", BUNDLED_MODEL / "config.json"):
        done = subprocess.run(
            [*command, "--ssl-certfile", str(path)], capture_output=True, text=True, timeout=DEADLINE_S
        )
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {path} cannot be used for HTTPS: ")
        assert done.stderr.count("\n") == 1


def broken_engine(*_: object) -> NoReturn:
    raise RuntimeError("the device is gone")


def test_engines_that_do_not_start_end_the_server() -> None:
    stderr = io.StringIO()
    engine = EngineArgs(model=str(BUNDLED_MODEL))
    with pytest.raises(EnginesFailed, match="the engines failed: the device is gone"):
        serve(
            ServeArgs(port=0), engine, stdout=io.StringIO(), stderr=stderr, engine_factory=f"{__name__}:broken_engine"
        )
    assert stderr.getvalue().endswith("starting the engines\n")


def test_an_address_that_others_reach_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOAL_API_KEY", raising=False)
    for host in ("127.0.0.1", "::1", "localhost"):
        ServeArgs(host=host).check_exposure(has_keys=False, insecure=False)
    for host in ("0.0.0.0", "10.0.0.1", "::", "example.org"):
        with pytest.raises(ValueError, match=f"host {re.escape(host)} can be reached from other machines"):
            ServeArgs(host=host).check_exposure(has_keys=False, insecure=False)
        ServeArgs(host=host).check_exposure(has_keys=True, insecure=False)
        ServeArgs(host=host).check_exposure(has_keys=False, insecure=True)
    keys = tmp_path / "keys"
    keys.write_text("one\n\n two \n")
    assert ServeArgs(api_key_file=str(keys)).read_keys() == ["one", "two"]
    monkeypatch.setenv("SHOAL_API_KEY", "three")
    assert ServeArgs(api_key_file=str(keys)).read_keys() == ["three", "one", "two"]
    keys.write_text("\n")
    with pytest.raises(ValueError, match="has no key; write one per line"):
        ServeArgs(api_key_file=str(keys)).read_keys()
