"""Messages survive the wire bit for bit, and nothing else gets in."""

from __future__ import annotations

import contextlib
import struct
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Struct, msgpack
from msgspec.structs import fields as struct_fields

from shoal.cluster.workers import wire
from shoal.cluster.workers.assignment import Assignment
from shoal.cluster.workers.wire import COMMANDS, EVENTS, ORDERS, REPORTS, Codec, WireError
from shoal.parallel.kv_transport import KVChunk
from shoal.parallel.request_id import RequestId
from shoal.runtime.engine.stats import EngineStats
from shoal.runtime.structured_params import StructuredOutputsParams
from shoal.runtime.types import (
    Finished,
    GeneratedTokens,
    Logprob,
    Prefilled,
    PromptLoaded,
    Request,
    SamplingParams,
    Tokens,
)

INT64 = st.integers(-(2**63), 2**63 - 1)
INDICES = st.integers(0, 2**31)
FLOATS = st.floats(allow_nan=True, allow_infinity=True)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
IDS = st.builds(RequestId, TEXT, INDICES)

PARAMS = st.builds(
    SamplingParams,
    n=st.integers(1, 8),
    temperature=st.floats(0, 2),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(-1, 100),
    min_p=st.floats(0, 1),
    max_tokens=st.none() | st.integers(100, 200),
    min_tokens=st.integers(0, 100),
    stop=st.none() | TEXT.filter(bool) | st.lists(TEXT.filter(bool), max_size=3),
    stop_token_ids=st.none() | st.lists(INDICES, max_size=3),
    seed=st.none() | INT64,
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0.1, 2),
    ignore_eos=st.booleans(),
    logit_bias=st.none() | st.dictionaries(INDICES, st.floats(-100, 100), max_size=3),
    include_stop_str_in_output=st.booleans(),
    skip_special_tokens=st.booleans(),
) | st.builds(
    SamplingParams,
    structured_outputs=st.builds(StructuredOutputsParams, regex=TEXT.filter(bool))
    | st.builds(StructuredOutputsParams, choice=st.lists(TEXT.filter(bool), min_size=1, max_size=3))
    | st.builds(StructuredOutputsParams, json=st.dictionaries(TEXT, INT64 | TEXT, max_size=3)),
)
TOKEN_IDS = st.lists(INDICES, max_size=4).map(tuple)
POSITIONS = st.dictionaries(INDICES, st.builds(Logprob, FLOATS, INDICES, st.none() | TEXT), max_size=3)
LOGPROBS = st.none() | st.lists(POSITIONS, max_size=4).map(tuple)
GENERATED = st.builds(GeneratedTokens, token_ids=TOKEN_IDS, logprobs=LOGPROBS)
REQUESTS = st.builds(
    Request,
    request_id=TEXT,
    prompt_token_ids=TOKEN_IDS,
    params=PARAMS,
    attempt=INDICES,
    index=st.integers(0, 2**62),
    report=st.sampled_from(["interval", "step"]),
    generated=st.lists(GENERATED, max_size=2).map(tuple),
    do_remote_decode=st.booleans(),
    do_remote_prefill=st.booleans(),
)
CHUNKS = st.builds(
    KVChunk,
    id=IDS,
    start=INDICES,
    end=INDICES,
    fingerprint=st.binary(max_size=4),
    epoch=INDICES,
    generation=INDICES,
    num_bytes=INDICES,
    checksum=INDICES,
    address=st.binary(max_size=4),
)
END_PREFILLS = st.builds(wire.EndPrefill, IDS, st.none() | st.lists(GENERATED, max_size=2).map(tuple))
TOKENS = st.builds(
    Tokens,
    id=IDS,
    sample_index=INDICES,
    start=INDICES,
    token_ids=TOKEN_IDS,
    logprobs=LOGPROBS,
    text_start=INDICES,
    text=TEXT,
)
PREFILLED = st.builds(
    Prefilled,
    id=IDS,
    num_cached_tokens=INDICES,
    prompt_logprobs=st.none() | st.lists(st.none() | POSITIONS, max_size=3).map(tuple),
    handed_over=st.booleans(),
)
FINISHED = st.builds(
    Finished,
    id=IDS,
    sample_index=INDICES,
    reason=st.sampled_from(["stop", "length", "abort", "error"]),
    num_tokens=INDICES,
    stop_reason=st.none() | INDICES | TEXT,
    error=st.none() | TEXT,
)
LOADED = st.builds(PromptLoaded, id=IDS, error=st.none() | TEXT)
ASSIGNMENTS = st.builds(
    Assignment,
    epoch=INDICES,
    rank=INDICES,
    tensor_parallel_size=INDICES,
    data_parallel_size=INDICES,
    store_host=TEXT,
    store_port=INDICES,
    replaced=TOKEN_IDS,
    local_world_size=st.none() | INDICES,
    num_kv_blocks=st.none() | INDICES,
    max_model_len=st.none() | INDICES,
)
STATS = st.builds(EngineStats, num_running_seqs=INT64, num_blocks=INT64, num_failed_transfers=INT64)
WORKER_REPORTS = st.one_of(
    st.builds(wire.Hello, TEXT, TEXT, TEXT, INDICES),
    st.builds(wire.Heartbeat, INT64, st.none() | STATS),
    st.builds(wire.LogMessage, TEXT, INDICES, TEXT),
    st.builds(wire.Loaded),
    st.builds(wire.Joining, INDICES),
    st.builds(wire.Joined, INDICES),
    st.builds(wire.Left, INDICES, TEXT),
    st.builds(wire.FaultNotice, TEXT),
)
SUPERVISOR_ORDERS = st.one_of(
    st.builds(wire.LeaveEpoch, INDICES),
    st.builds(wire.LoadRank, ASSIGNMENTS),
    st.builds(wire.JoinEpoch, ASSIGNMENTS),
    st.builds(wire.FaultNoted),
)
COMMAND_MESSAGES = st.one_of(REQUESTS, CHUNKS, END_PREFILLS, st.builds(wire.Abort, IDS))
EVENT_MESSAGES = st.one_of(TOKENS, PREFILLED, FINISHED, CHUNKS, LOADED)


def exact(value: object) -> object:
    """The value with every type spelt out, floats as their bits and dictionaries in their order."""
    if isinstance(value, float):
        return "float", struct.pack(">d", value)
    if isinstance(value, dict):
        return "dict", [(exact(k), exact(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return type(value).__name__, [exact(v) for v in value]
    if isinstance(value, Struct):
        return type(value).__name__, [(f.name, exact(getattr(value, f.name))) for f in struct_fields(value)]
    if hasattr(value, "__dataclass_fields__"):
        names = [f.name for f in fields(value)]  # type: ignore[arg-type]
        return type(value).__name__, [(name, exact(getattr(value, name))) for name in names]
    return type(value).__name__, value


@given(COMMAND_MESSAGES)
def test_a_command_comes_back_exactly(command: wire.Command) -> None:
    assert exact(COMMANDS.decode(COMMANDS.encode(command))) == exact(command)


@given(EVENT_MESSAGES)
def test_an_event_comes_back_exactly(event: wire.Event) -> None:
    assert exact(EVENTS.decode(EVENTS.encode(event))) == exact(event)


@given(WORKER_REPORTS, SUPERVISOR_ORDERS)
def test_control_messages_come_back_exactly(report: wire.WorkerReport, order: wire.SupervisorOrder) -> None:
    assert exact(REPORTS.decode(REPORTS.encode(report))) == exact(report)
    assert exact(ORDERS.decode(ORDERS.encode(order))) == exact(order)


def test_whole_numbers_arrive_as_the_same_numbers() -> None:
    params = SamplingParams(temperature=1, top_p=1, logit_bias={3: 5})
    arrived = COMMANDS.decode(COMMANDS.encode(Request(request_id="7", prompt_token_ids=(1,), params=params)))
    assert isinstance(arrived, Request)
    assert arrived.params == params


def test_the_bytes_are_a_header_and_an_array() -> None:
    request = Request(request_id="7", prompt_token_ids=(1, 2), params=SamplingParams(seed=5), index=3)
    message = COMMANDS.encode(request)
    assert message[:4] == b"SCM1"
    assert int.from_bytes(message[4:8], "big") == len(message) - 8
    tag, request_id, prompt, params, *rest = msgpack.decode(message[8:])
    assert (tag, request_id, prompt) == ("r", "7", [1, 2])
    assert params["seed"] == 5
    assert rest == [0, 3, "interval", None, [], 0, False, False]
    tokens = Tokens(id=RequestId("7", 2), sample_index=1, start=30, token_ids=(5, 6), text="ab")
    assert msgpack.decode(EVENTS.encode(tokens)[8:]) == ["t", ["7", 2], 1, 30, [5, 6], None, 0, "ab"]


GOOD = COMMANDS.encode(Request(request_id="7", prompt_token_ids=(1,), params=SamplingParams()))


def message_with(**changes: bytes) -> bytes:
    payload = changes.get("payload", GOOD[8:])
    return changes.get("magic", GOOD[:4]) + changes.get("size", len(payload).to_bytes(4, "big")) + payload


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (b"", "0 bytes"),
        (message_with(magic=b"SEV1"), "b'SEV1', expected b'SCM1'"),
        (message_with(size=b"\0\0\0\1"), "announces 1 bytes"),
        (GOOD + b"x", "announces"),
        (message_with(size=b"\xff\xff\xff\xff"), "announces 4294967295 bytes, at most"),
        (message_with(payload=b"\x92\xa1a"), "truncated"),
        (message_with(payload=b"\x01"), "array"),
        (message_with(payload=msgpack.encode(["t", ["7", 0], 0, 0, [], None, 0, ""])), "'t'"),
        (message_with(payload=msgpack.encode(["a"])), "at least"),
        (message_with(payload=msgpack.encode(["a", ["7", 0], 1])), "at most"),
        (message_with(payload=msgpack.encode(["a", ["7", "x"]])), "`int`, got `str`"),
        (message_with(payload=msgpack.encode(["a", [7, 0]])), "`str`, got `int`"),
        (message_with(payload=b"\x92\xa1a\x92\xa1\xff\x00"), "UTF-8"),
    ],
)
def test_anything_else_is_refused(message: bytes, says: str) -> None:
    with pytest.raises(WireError, match=says):
        COMMANDS.decode(message)


MESSAGES = COMMAND_MESSAGES.map(COMMANDS.encode) | EVENT_MESSAGES.map(EVENTS.encode)
PIECES = st.binary(max_size=4) | st.sampled_from(
    [
        b"\x91" * 900,  # deep
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
    for decode in (COMMANDS.decode, EVENTS.decode):
        with contextlib.suppress(WireError):
            decode(message)


def test_a_deep_value_under_an_unknown_name_is_an_error() -> None:
    unknown = b"\x81\xa1x" + b"\x91" * 100_000 + b"\x01"
    payload = b"\x94\xa1r\xa17\x91\x01" + unknown
    with pytest.raises(WireError):
        COMMANDS.decode(message_with(payload=payload))


def test_bad_parameters_do_not_pass_as_a_request() -> None:
    good = msgpack.decode(GOOD[8:])
    good[3]["temperature"] = -1.0
    with pytest.raises(WireError, match="temperature must be a number between 0 and 100, got -1"):
        COMMANDS.decode(message_with(payload=msgpack.encode(good)))


def test_sizes_are_bounded() -> None:
    request = Request(request_id="7", prompt_token_ids=tuple(range(100)), params=SamplingParams())
    message = COMMANDS.encode(request)
    small: Codec[wire.Command] = Codec(b"SCM1", wire.Command, len(message) - 9)
    with pytest.raises(WireError, match=r"request 7.*above the limit"):
        small.encode(request)
    with pytest.raises(WireError, match="bytes, expected"):
        small.decode(message)


def test_what_no_message_can_hold_is_refused_by_name() -> None:
    request = Request(request_id="7", prompt_token_ids=(1,), params=SamplingParams(), index=2**70)
    with pytest.raises(WireError, match="request 7: an integer does not fit"):
        COMMANDS.encode(request)
    with pytest.raises(WireError, match=r"request 7 \(attempt 2\): a text has a lone surrogate"):
        EVENTS.encode(PromptLoaded(id=RequestId("7", 2), error="\ud800"))


def test_a_stop_string_that_no_message_can_hold_is_refused_before() -> None:
    with pytest.raises(ValueError, match="stop has a lone surrogate, which is not a character"):
        SamplingParams(stop=["a", "b\udfff"])
