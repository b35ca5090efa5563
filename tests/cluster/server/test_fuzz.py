"""Requests that nobody should send: each one is answered or refused with a reason, and the next one is answered.

PYTHONPATH=.src python -P -m tests.cluster.server.test_fuzz 10000 --seed 1
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from shoal.cluster.openai.errors import MAX_MESSAGE_CHARS
from tests.support.raw_http import Connection, Response
from tests.support.served import DEADLINE_S, NAME, Served, serving

NUM_CASES, NUM_PARTS = 1200, 8
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "add", "strict": True, "parameters": SCHEMA}}
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 5}'}}
MESSAGES: list[Any] = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "héllo 世\n"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "5", "tool_call_id": "c"},
    {"role": "user", "content": "2 + 3"},
]
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": MESSAGES[-1:], "max_tokens": 3, "stream": True, "model": NAME}),
    (
        "/v1/chat/completions",
        {"messages": MESSAGES, "tools": [TOOL], "tool_choice": "auto", "max_completion_tokens": 3, "seed": 5},
    ),
    (
        "/v1/chat/completions",
        {
            "messages": MESSAGES[:2],
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}},
            "logprobs": True,
            "top_logprobs": 2,
            "max_tokens": 2,
            "chat_template_kwargs": {"thinking": True},
        },
    ),
    ("/v1/completions", {"prompt": ["a b", "c"], "max_tokens": 3, "n": 2, "stop": ["x", "y"], "logprobs": 1}),
    (
        "/v1/completions",
        {
            "prompt": [21, 22],
            "max_tokens": 0,
            "echo": True,
            "logprobs": 1,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": False},
        },
    ),
    (
        "/v1/completions",
        {
            "prompt": "a",
            "max_tokens": 2,
            "structured_outputs": {"regex": "[ab]+"},
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 5,
            "logit_bias": {"5": -1},
            "stop_token_ids": [7],
        },
    ),
    ("/v1/completions", {"prompt": "a", "max_tokens": 2, "guided_json": SCHEMA, "min_tokens": 1}),
    ("/tokenize", {"prompt": "a b c", "add_special_tokens": False, "return_token_strs": True}),
    ("/tokenize", {"messages": MESSAGES, "tools": [TOOL]}),
    ("/detokenize", {"tokens": [1, 2, 200]}),
]
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    1.0,
    0.5,
    -0.0,
    1e308,
    2**31,
    2**63,
    -(2**64),
    10**19,
    "",
    "a",
    "\0",
    "\ud800",
    "x" * 5000,
    "((((a*)*)*)*)*",
    "[",
    "$ref",
    [],
    [[]],
    [None],
    [1.5],
    ["a", 1],
    [[1], "a"],
    {},
    {"": None},
    {"a": {"a": {"a": []}}},
    {"type": "json_schema"},
    {"type": "function"},
    {"$ref": "#"},
    {"$ref": "http://a"},
    {"regex": "(?=a)(", "json": {}},
    {"grammar": 'start: start start | "a"'},
    {"choice": []},
    {"json": {"type": "object", "patternProperties": {"(": {}}}},
    {"json": {"allOf": [{"type": "string"}, {"type": "integer"}], "minLength": 10**9}},
]
RAW_VALUES = [
    b"NaN",
    b"1e999",
    b"-Infinity",
    b"9" * 5000,
    b"1" * 21,
    b'"\\ud83d"',
    b'"\xff"',
    b"'a'",
    b"{" * 100,
    b"tru",
]
PIECES = [
    b"\0",
    b"\xff",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b"\r\n",
    b'"',
    b"\\",
    b"{",
    b"]",
    b",",
    b"/*",
    b"[" * 70,
]
HEADERS = [
    b"Host: [",
    b"Host: a\r\nHost: b",
    b"Host: \xff\xfe",
    b"Host: //a?b#c@d:99999",
    b"X-Request-Id: \xe9\xff",
    b"X-Request-Id: a b\tc",
    b"X-Request-Id: " + b"x" * 1000,
    b"traceparent: \xff\x80",
    b"Accept: application/openmetrics-text; version=\xff",
    b"Accept: */*;q=x,,;",
    b"Authorization: Bearer \xff",
    b"Content-Type: text/plain; charset=utf-16",
    b"Content-Encoding: gzip",
    b"Expect: 100-continue",
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x",
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: x",
    b"Connection: close",
    b"Connection: \xff",
    b"Content-Length: -1",
    b"Content-Length: 99999999999999999999",
    b"Content-Length: 5\r\nContent-Length: 6",
    b"Content-Length: +3",
    b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding: chunked, identity",
    b"Range: bytes=0-",
    b" folded: a",
    b"no colon",
    b": empty",
    b"na me: a",
    b"nul: a\0b",
    b"cr: a\rb",
    b"X: \x01\x7f",
]
METHODS = [
    b"GET",
    b"HEAD",
    b"PUT",
    b"DELETE",
    b"OPTIONS",
    b"PATCH",
    b"TRACE",
    b"CONNECT",
    b"PRI",
    b"BREW",
    b"get",
    b"POST\xff",
]
PATHS = [
    b"/",
    b"*",
    b"",
    b"//",
    b"///a//",
    b"/v1/models/%00",
    b"/v1/models/%ff%fe",
    b"/v1/models/%ed%a0%80",
    b"/v1/models/a/b?c#d",
    b"/v1/models/" + b"a" * 3000,
    b"/v1/completions/",
    b"/v1/completions?%ff=%00",
    b"/v1/completions?\xff",
    b"/v1//completions",
    b"/v1/../v1/completions",
    b"/%76%31/completions",
    b"/v1/completions%3Fa",
    b"/live/",
    b"/li\x00ve",
    b"/%",
    b"/%zz",
    b"/\xc3\xa9",
    b"http://a",
    b"http://a/live",
    b"http://[::1/live",
    b"http://a:b/live",
    b"https://user:p@a:1/v1/models",
    b"a:443",
    b"live",
    b"/metrics",
    b"/health",
    b"/version",
    b"/tokenizer_info",
    b"/v1/models",
]


def mutated(rng: random.Random, value: Any, names: list[str]) -> Any:
    """A JSON value with one change somewhere in it."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        changed = dict(value)
        name = rng.choice(list(value))
        kind = rng.randrange(8)
        if kind == 0:
            del changed[name]
        elif kind == 1:
            changed[rng.choice([name + "s", name[:-1], name.upper(), "", rng.choice(names)])] = changed.pop(name)
        elif kind == 2:
            changed[rng.choice(names)] = rng.choice(VALUES)
        else:
            changed[name] = mutated(rng, value[name], names)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.7:
        changed_list = list(value)
        at = rng.randrange(len(value))
        changed_list[at : at + 1] = rng.choice([[], [value[at]] * 3, [mutated(rng, value[at], names)]])
        return changed_list
    return rng.choice(VALUES)


def fuzzed_body(rng: random.Random, body: dict[str, Any], names: list[str]) -> bytes:
    """A body with changes to its values, and sometimes to its bytes."""
    value: Any = body
    for _ in range(rng.choice([0, 1, 1, 1, 1, 2, 3])):
        value = mutated(rng, value, names)
    data = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        colons = [i for i, byte in enumerate(data) if byte == ord(":")] or [0]
        at = rng.choice(colons) + 1
        data = data[:at] + rng.choice(RAW_VALUES) + data[at + rng.choice([0, 1, 2, 8]) :]
    if rng.random() < 0.1:
        at = rng.randrange(len(data) + 1)
        data = data[:at] + rng.choice(PIECES) + data[at:]
    if rng.random() < 0.05:
        data = data[: rng.randrange(len(data) + 1)]
    return data


def chunked(rng: random.Random, data: bytes) -> bytes:
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(3))
    parts = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True) if a < b]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def fuzzed_request(rng: random.Random) -> bytes:
    """The bytes of a request. It is whole, unless its head says otherwise."""
    path, body = rng.choice(BODIES)
    names = sorted({name for _, one in BODIES for name in one} | {"tools", "best_of", "functions", "prompt_logprobs"})
    data = fuzzed_body(rng, body, names)
    method, target = b"POST", path.encode()
    headers = [b"Host: shoal"]
    if rng.random() < 0.08:
        method = rng.choice(METHODS)
    if rng.random() < 0.1:
        target = rng.choice(PATHS)
    while rng.random() < 0.15:
        headers.insert(rng.randrange(len(headers) + 1), rng.choice(HEADERS))
    if rng.random() < 0.2:
        headers.append(b"Transfer-Encoding: chunked")
        data = chunked(rng, data)
    else:
        headers.append(b"Content-Length: %d" % len(data))
    version = rng.choice([b"HTTP/1.1"] * 20 + [b"HTTP/1.0", b"HTTP/2.0", b"HTTP/1.", b"HTCPCP/1.0", b""])
    return b"%b %b %b\r\n%b\r\n\r\n%b" % (method, target, version, b"\r\n".join(headers), data)


def check(response: Response) -> None:
    """An answer, or an error of the client's in OpenAI's format with a sentence."""
    assert 200 <= response.status < 500, response
    if not response.has_body:
        return
    if response.status < 300:
        if response.headers.get("content-type", "").startswith("application/json"):
            json.loads(response.body)
        return
    assert response.status >= 400, response
    (error,) = json.loads(response.body).values()
    assert set(error) == {"code", "message", "type", "param"}
    assert error["type"] == "invalid_request_error"
    assert isinstance(error["code"], str)
    assert len(error["message"].split()) > 1, "it is no sentence"
    assert len(error["message"]) <= MAX_MESSAGE_CHARS + len("...")


def fuzz(served: Served, seed: int, num_cases: int) -> Counter[int]:
    """Send random requests; returns how many had which status."""
    rng = random.Random(seed)
    statuses: Counter[int] = Counter()
    for number in range(num_cases):
        request = fuzzed_request(rng)
        try:
            with Connection(served.port) as connection:
                connection.send_in_pieces(rng, request)
                response = connection.read_response(request)
                check(response)
                statuses[response.status] += 1
                if number % 10 == 0:
                    assert_answers(served)
        except Exception as error:
            raise AssertionError(f"case {number} of seed {seed}: {request[:3000]!r}") from error
    assert_answers(served)
    deadline = time.monotonic() + DEADLINE_S
    while served.client.num_requests:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return statuses


def assert_answers(served: Served) -> None:
    """A good request has its answer."""
    body = json.dumps({"prompt": [21, 22], "max_tokens": 2}).encode()
    request = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    with Connection(served.port) as connection:
        connection.send(request)
        response = connection.read_response(request)
    assert response.status == 200, response
    assert json.loads(response.body)["choices"][0]["text"] == "xx"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as (one, _):
        yield one


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_bodies_without_changes_are_answered(served: Served, path: str, body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    request = b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (path.encode(), len(data), data)
    with Connection(served.port) as connection:
        connection.send(request)
        response = connection.read_response(request)
    assert response.status == 200, response


@pytest.mark.parametrize("seed", range(NUM_PARTS))
def test_every_request_is_answered_or_refused_with_a_reason(served: Served, seed: int) -> None:
    statuses = fuzz(served, seed, NUM_CASES // NUM_PARTS)
    assert statuses[200] > 0
    assert statuses[400] > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("num_cases", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    socket.setdefaulttimeout(DEADLINE_S)
    begin = time.monotonic()
    with serving() as (one, _):
        print(dict(fuzz(one, args.seed, args.num_cases)), f"{time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
