"""Requests and outputs survive the wire bit for bit, and nothing else gets in."""

from __future__ import annotations

import contextlib
import struct
from dataclasses import fields

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.cluster.workers import wire
from shoal.parallel.kv_transport import KVChunk
from shoal.runtime.types import (
    CompletionOutput,
    GeneratedTokens,
    Logprob,
    PromptLoaded,
    Request,
    RequestOutput,
    RequestProgress,
    SamplingParams,
)

INT64 = st.integers(-(2**63), 2**63 - 1)
IDS = st.integers(0, 2**31)
FLOATS = st.floats(allow_nan=True, allow_infinity=True)
TEXT = st.text(st.characters())  # lone surrogates included

PARAMS = st.builds(
    SamplingParams,
    n=st.integers(1, 8),
    temperature=st.floats(0, 2) | st.integers(0, 2),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(-1, 100),
    min_p=st.floats(0, 1),
    max_tokens=st.none() | st.integers(100, 200),
    min_tokens=st.integers(0, 100),
    stop=st.none() | TEXT.filter(bool) | st.lists(TEXT.filter(bool), max_size=3),
    stop_token_ids=st.none() | st.lists(IDS, max_size=3),
    seed=st.none() | INT64,
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0.1, 2),
    ignore_eos=st.booleans(),
    logit_bias=st.none() | st.dictionaries(IDS, st.floats(-100, 100), max_size=3),
    include_stop_str_in_output=st.booleans(),
    skip_special_tokens=st.booleans(),
)
GENERATED = st.builds(
    GeneratedTokens,
    token_ids=st.lists(IDS, max_size=4).map(tuple),
    logprobs=st.none()
    | st.lists(st.dictionaries(IDS, st.builds(Logprob, FLOATS, IDS), max_size=3), max_size=4).map(tuple),
)
PROGRESS = st.builds(RequestProgress, request_id=TEXT, index=IDS, start=IDS, new=GENERATED)
REQUESTS = st.builds(
    Request,
    request_id=TEXT,
    prompt_token_ids=st.lists(IDS, max_size=5).map(tuple),
    params=PARAMS,
    index=st.integers(0, 2**62),
    stream=st.booleans(),
    report_progress=st.booleans(),
    generated=st.lists(GENERATED, max_size=2).map(tuple),
    do_remote_decode=st.booleans(),
    do_remote_prefill=st.booleans(),
)
CHUNKS = st.builds(
    KVChunk,
    request_id=TEXT,
    start=IDS,
    end=IDS,
    fingerprint=st.binary(max_size=4),
    epoch=IDS,
    generation=IDS,
    num_bytes=IDS,
    checksum=IDS,
    address=st.binary(max_size=4),
)
LOADED = st.builds(PromptLoaded, request_id=TEXT, error=st.none() | TEXT)
END_PREFILLS = st.builds(wire.EndPrefill, TEXT, st.none() | st.lists(GENERATED, max_size=2).map(tuple))
POSITIONS = st.dictionaries(IDS, st.builds(Logprob, FLOATS, IDS, st.none() | TEXT), max_size=3)
COMPLETIONS = st.builds(
    CompletionOutput,
    index=IDS,
    text=TEXT,
    token_ids=st.lists(IDS, max_size=4),
    cumulative_logprob=st.none() | FLOATS,
    logprobs=st.none() | st.lists(POSITIONS, max_size=3),
    finish_reason=st.sampled_from([None, "stop", "length", "abort", "error"]),
    stop_reason=st.none() | IDS | TEXT,
    error=st.none() | TEXT,
)
OUTPUTS = st.builds(
    RequestOutput,
    request_id=TEXT,
    prompt_token_ids=st.lists(IDS, max_size=4),
    outputs=st.lists(COMPLETIONS, max_size=3),
    finished=st.booleans(),
    prompt=st.none() | TEXT,
    prompt_logprobs=st.none() | st.lists(st.none() | POSITIONS, max_size=3),
    num_cached_tokens=IDS,
)


def exact(value: object) -> object:
    """The value with every type spelt out, floats as their bits and dictionaries in their order."""
    if isinstance(value, float):
        return "float", struct.pack(">d", value)
    if isinstance(value, dict):
        return "dict", [(exact(k), exact(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return type(value).__name__, [exact(v) for v in value]
    if hasattr(value, "__dataclass_fields__"):
        names = [f.name for f in fields(value)]  # type: ignore[arg-type]
        return type(value).__name__, [(name, exact(getattr(value, name))) for name in names]
    return type(value).__name__, value


@given(REQUESTS)
def test_a_request_comes_back_exactly(request: Request) -> None:
    assert exact(wire.unpack_request(wire.pack_request(request))) == exact(request)


@given(OUTPUTS)
def test_an_output_comes_back_exactly(output: RequestOutput) -> None:
    assert exact(wire.unpack_output(wire.pack_output(output))) == exact(output)


@given(st.one_of(PROGRESS, OUTPUTS, CHUNKS, LOADED))
def test_an_event_comes_back_exactly(event: wire.Event) -> None:
    assert exact(wire.unpack_event(wire.pack_event(event))) == exact(event)


@given(st.one_of(REQUESTS, CHUNKS, END_PREFILLS, st.builds(wire.Abort, TEXT)))
def test_a_command_comes_back_exactly(command: wire.Command) -> None:
    assert exact(wire.unpack_command(wire.pack_command(command))) == exact(command)


def test_commands_and_events_are_not_taken_for_each_other() -> None:
    with pytest.raises(wire.WireError, match="b'SAB1', expected one of"):
        wire.unpack_event(wire.pack_command(wire.Abort("7")))
    with pytest.raises(wire.WireError, match="b'SPL1', expected one of"):
        wire.unpack_command(wire.pack_event(PromptLoaded(request_id="7")))


def test_the_bytes_are_a_header_and_msgpack() -> None:
    request = Request(request_id="7", prompt_token_ids=(1, 2), params=SamplingParams(seed=5), index=3)
    message = wire.pack_request(request)
    assert message[:4] == b"SRQ1"
    assert int.from_bytes(message[4:8], "big") == len(message) - 8
    row = msgpack.unpackb(message[8:])
    assert row[:2] == ["7", [1, 2]]
    assert row[2][[f.name for f in fields(SamplingParams)].index("seed")] == 5
    assert row[3:] == [3, False, False, [], False, False, None]


def message_with(**changes: bytes) -> bytes:
    good = wire.pack_request(Request(request_id="7", prompt_token_ids=(1,), params=SamplingParams()))
    magic, size, payload = (
        changes.get("magic", good[:4]),
        changes.get("size", good[4:8]),
        changes.get("payload", good[8:]),
    )
    return magic + size + payload


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (b"", "0 bytes"),
        (message_with(magic=b"SRO1"), "SRO1"),
        (message_with(size=b"\0\0\0\1"), "announces 1 bytes"),
        (message_with() + b"x", "announces"),
        (message_with(size=b"\0\0\0\2", payload=b"\x92\x01"), "not msgpack"),
        (message_with(size=b"\0\0\0\1", payload=b"\x01"), "10 fields"),
        (message_with(size=b"\0\0\0\2", payload=b"\x91\x01"), "10 fields"),
    ],
)
def test_anything_else_is_refused(message: bytes, says: str) -> None:
    with pytest.raises(wire.WireError, match=says):
        wire.unpack_request(message)


MESSAGES = st.one_of(
    st.builds(wire.pack_command, st.one_of(REQUESTS, CHUNKS, END_PREFILLS)),
    st.builds(wire.pack_event, st.one_of(PROGRESS, OUTPUTS, LOADED)),
)
PIECES = st.binary(max_size=4) | st.sampled_from(
    [
        b"\x91" * 900,  # deep, but not too deep for msgpack
        b"\x91" * 5000,
        b"\x81\x90\x01",  # a list as a key
        b"\x81\x80\x01",
        b"\xdd\xff\xff\xff\xff",  # a list, an object, bytes of 4 GB
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xc7\x0c\xff" + b"\xff" * 12,  # no point in time
        b"\xc0",
        b"\xcb\x7f\xf8" + bytes(6),  # NaN
    ]
)


@given(MESSAGES, st.lists(st.tuples(st.integers(0, 400), st.integers(0, 4), PIECES), min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_a_damaged_message_is_a_message_or_an_error(message: bytes, damages: list[tuple[int, int, bytes]]) -> None:
    payload = message[8:]
    for start, length, piece in damages:
        start %= len(payload) + 1
        payload = payload[:start] + piece + payload[start + length :]
    message = message[:4] + len(payload).to_bytes(4, "big") + payload
    for unpack in (wire.unpack_command, wire.unpack_event):
        with contextlib.suppress(wire.WireError):
            unpack(message)


def test_bad_parameters_do_not_pass_as_a_request() -> None:
    good = msgpack.unpackb(message_with()[8:])
    good[2][[f.name for f in fields(SamplingParams)].index("temperature")] = -1.0
    payload = msgpack.packb(good)
    with pytest.raises(ValueError, match="temperature"):
        wire.unpack_request(message_with(size=len(payload).to_bytes(4, "big"), payload=payload))


def test_sizes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(request_id="7", prompt_token_ids=tuple(range(100)), params=SamplingParams())
    message = wire.pack_request(request)
    monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", len(message) - 9)
    with pytest.raises(wire.WireError, match=r"request 7.*above the limit"):
        wire.pack_request(request)
    with pytest.raises(wire.WireError, match="bytes, expected"):
        wire.unpack_request(message)


def test_an_integer_above_64_bits_is_refused_by_name() -> None:
    request = Request(request_id="7", prompt_token_ids=(1,), params=SamplingParams(), index=2**70)
    with pytest.raises(wire.WireError, match="request 7: an integer does not fit"):
        wire.pack_request(request)
