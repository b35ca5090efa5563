"""What goes into a worker and what comes out of it, as bytes: a fixed header, then msgpack.

    magic (4 bytes) | payload length (4 bytes, big endian) | payload

Values round-trip exactly: floats as their 64 bits, None as None, integer keys as integers, text with lone surrogates.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import msgpack

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

MAX_MESSAGE_BYTES = 1 << 30
"""Upper bound of one message; a request within its limits stays far below."""

_HEADER = struct.Struct(">4sI")
_REQUEST = b"SRQ1"
_OUTPUT = b"SRO1"
_PROGRESS = b"SRP1"
_CHUNK = b"SKC1"
_END_PREFILL = b"SPE1"
_ABORT = b"SAB1"
_LOADED = b"SPL1"
_PARAMS = tuple(f.name for f in fields(SamplingParams))
_CHUNK_FIELDS = tuple(f.name for f in fields(KVChunk))


@dataclass(frozen=True, slots=True)
class EndPrefill:
    """See `Engine.end_prefill`."""

    request_id: str
    generated: tuple[GeneratedTokens, ...] | None


@dataclass(frozen=True, slots=True)
class Abort:
    """See `Engine.abort`."""

    request_id: str


T = TypeVar("T")
Command = Request | KVChunk | EndPrefill | Abort
"""What a worker is told, in the order in which it must act on it."""
Event = RequestOutput | RequestProgress | KVChunk | PromptLoaded
"""What a worker tells, in the order in which it came about."""


class WireError(ValueError):
    """Bytes that are not a message of the expected kind, or a value that no message can hold."""


def pack_request(request: Request) -> bytes:
    """To bytes; WireError for a value that does not fit (an integer above 64 bits, a message above the size limit)."""
    params = [getattr(request.params, name) for name in _PARAMS]
    generated = [pack_tokens(g) for g in request.generated]
    row = [
        request.request_id,
        request.prompt_token_ids,
        params,
        request.index,
        request.stream,
        request.report_progress,
        generated,
        request.do_remote_decode,
        request.do_remote_prefill,
        request.reasoning_end_token_id,
    ]
    return _pack(_REQUEST, row, request.request_id)


def unpack_request(message: bytes) -> Request:
    """The inverse of `pack_request`; WireError for anything else."""
    row = _unpack(_REQUEST, message, 10)
    request_id, prompt_token_ids, params, index, stream, report_progress, generated, *remote = row
    with _converting(_REQUEST):
        return Request(
            request_id=request_id,
            prompt_token_ids=tuple(prompt_token_ids),
            params=SamplingParams(**dict(zip(_PARAMS, params, strict=True))),
            index=index,
            stream=stream,
            report_progress=report_progress,
            generated=tuple(unpack_tokens(tokens) for tokens in generated),
            do_remote_decode=remote[0],
            do_remote_prefill=remote[1],
            reasoning_end_token_id=remote[2],
        )


def pack_output(output: RequestOutput) -> bytes:
    """To bytes; WireError for a message above the size limit."""
    row = [
        output.request_id,
        output.prompt_token_ids,
        [_completion_row(o) for o in output.outputs],
        output.finished,
        output.prompt,
        None if output.prompt_logprobs is None else [p and _logprob_rows(p) for p in output.prompt_logprobs],
        output.num_cached_tokens,
    ]
    return _pack(_OUTPUT, row, output.request_id)


def unpack_output(message: bytes) -> RequestOutput:
    """The inverse of `pack_output`; WireError for anything else."""
    request_id, prompt_token_ids, outputs, finished, prompt, prompt_logprobs, num_cached = _unpack(_OUTPUT, message, 7)
    with _converting(_OUTPUT):
        return RequestOutput(
            request_id=request_id,
            prompt_token_ids=prompt_token_ids,
            outputs=[_completion(row) for row in outputs],
            finished=finished,
            prompt=prompt,
            prompt_logprobs=None
            if prompt_logprobs is None
            else [p if p is None else _logprobs(p) for p in prompt_logprobs],
            num_cached_tokens=num_cached,
        )


def pack_progress(progress: RequestProgress) -> bytes:
    """To bytes; WireError for a message above the size limit."""
    row = [progress.request_id, progress.index, progress.start, pack_tokens(progress.new)]
    return _pack(_PROGRESS, row, progress.request_id)


def unpack_progress(message: bytes) -> RequestProgress:
    """The inverse of `pack_progress`; WireError for anything else."""
    request_id, index, start, new = _unpack(_PROGRESS, message, 4)
    with _converting(_PROGRESS):
        return RequestProgress(request_id=request_id, index=index, start=start, new=unpack_tokens(new))


def pack_chunk(chunk: KVChunk) -> bytes:
    """To bytes."""
    return _pack(_CHUNK, [getattr(chunk, name) for name in _CHUNK_FIELDS], chunk.request_id)


def unpack_chunk(message: bytes) -> KVChunk:
    """The inverse of `pack_chunk`; WireError for anything else."""
    return KVChunk(**dict(zip(_CHUNK_FIELDS, _unpack(_CHUNK, message, len(_CHUNK_FIELDS)), strict=True)))


def pack_command(command: Command) -> bytes:
    """To bytes; WireError for a value that no message can hold."""
    match command:
        case Request():
            return pack_request(command)
        case KVChunk():
            return pack_chunk(command)
        case EndPrefill(request_id, generated):
            rows = None if generated is None else [pack_tokens(g) for g in generated]
            return _pack(_END_PREFILL, [request_id, rows], request_id)
        case Abort(request_id):
            return _pack(_ABORT, [request_id], request_id)


def unpack_command(message: bytes) -> Command:
    """The inverse of `pack_command`; WireError for anything else."""
    unpack: dict[bytes, Callable[[bytes], Command]] = {
        _REQUEST: unpack_request,
        _CHUNK: unpack_chunk,
        _END_PREFILL: _unpack_end_prefill,
        _ABORT: lambda m: Abort(*_unpack(_ABORT, m, 1)),
    }
    return _by_kind(unpack, message)(message)


def pack_event(event: Event) -> bytes:
    """To bytes; WireError for a message above the size limit."""
    match event:
        case RequestOutput():
            return pack_output(event)
        case RequestProgress():
            return pack_progress(event)
        case KVChunk():
            return pack_chunk(event)
        case PromptLoaded():
            return _pack(_LOADED, [event.request_id, event.error], event.request_id)


def unpack_event(message: bytes) -> Event:
    """The inverse of `pack_event`; WireError for anything else."""
    unpack: dict[bytes, Callable[[bytes], Event]] = {
        _OUTPUT: unpack_output,
        _PROGRESS: unpack_progress,
        _CHUNK: unpack_chunk,
        _LOADED: _unpack_loaded,
    }
    return _by_kind(unpack, message)(message)


def _by_kind(unpack: dict[bytes, Callable[[bytes], T]], message: bytes) -> Callable[[bytes], T]:
    kind = message[:4]
    if kind not in unpack:
        raise WireError(f"a message starts with {kind!r}, expected one of {sorted(unpack)}")
    return unpack[kind]


def _unpack_end_prefill(message: bytes) -> EndPrefill:
    request_id, rows = _unpack(_END_PREFILL, message, 2)
    with _converting(_END_PREFILL):
        return EndPrefill(request_id, None if rows is None else tuple(unpack_tokens(row) for row in rows))


def _unpack_loaded(message: bytes) -> PromptLoaded:
    request_id, error = _unpack(_LOADED, message, 2)
    return PromptLoaded(request_id=request_id, error=error)


def pack_tokens(generated: GeneratedTokens) -> list[Any]:
    """Plain lists for msgpack: token ids, and per token [token, logprob, rank, token, logprob, rank, ...] or None."""
    if generated.logprobs is None:
        return [generated.token_ids, None]
    return [
        generated.token_ids,
        [[x for t, p in position.items() for x in (t, p.logprob, p.rank)] for position in generated.logprobs],
    ]


def unpack_tokens(row: list[Any]) -> GeneratedTokens:
    """The inverse of `pack_tokens`."""
    token_ids, logprobs = row
    if logprobs is None:
        return GeneratedTokens(tuple(token_ids))
    return GeneratedTokens(
        tuple(token_ids),
        tuple(
            {token: Logprob(value, rank) for token, value, rank in zip(p[::3], p[1::3], p[2::3], strict=True)}
            for p in logprobs
        ),
    )


def _completion_row(o: CompletionOutput) -> list[Any]:
    logprobs = None if o.logprobs is None else [_logprob_rows(p) for p in o.logprobs]
    return [o.index, o.text, o.token_ids, o.cumulative_logprob, logprobs, o.finish_reason, o.stop_reason, o.error]


def _completion(row: list[Any]) -> CompletionOutput:
    index, text, token_ids, cumulative_logprob, logprobs, finish_reason, stop_reason, error = row
    return CompletionOutput(
        index=index,
        text=text,
        token_ids=token_ids,
        cumulative_logprob=cumulative_logprob,
        logprobs=None if logprobs is None else [_logprobs(p) for p in logprobs],
        finish_reason=finish_reason,
        stop_reason=stop_reason,
        error=error,
    )


def _logprob_rows(position: dict[int, Logprob]) -> dict[int, list[Any]]:
    return {token: [p.logprob, p.rank, p.decoded_token] for token, p in position.items()}


def _logprobs(rows: dict[int, list[Any]]) -> dict[int, Logprob]:
    return {token: Logprob(*row) for token, row in rows.items()}


@contextmanager
def _converting(magic: bytes) -> Iterator[None]:
    """Fields of a message become values; those of another type than was packed fail in ways of their own."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise WireError(f"a message {magic!r} holds something else than its fields: {error}") from error


def _pack(magic: bytes, row: list[Any], request_id: str) -> bytes:
    try:
        payload = msgpack.packb(row, unicode_errors="surrogatepass")
    except OverflowError as error:
        raise WireError(f"request {request_id}: an integer does not fit in 64 bits") from error
    assert isinstance(payload, bytes)
    if len(payload) > MAX_MESSAGE_BYTES:
        raise WireError(
            f"request {request_id}: a message of {len(payload)} bytes is above the limit of {MAX_MESSAGE_BYTES}"
        )
    return _HEADER.pack(magic, len(payload)) + payload


def _unpack(magic: bytes, message: bytes, num_fields: int) -> list[Any]:
    if len(message) < _HEADER.size or len(message) > _HEADER.size + MAX_MESSAGE_BYTES:
        raise WireError(
            f"a message has {len(message)} bytes, expected {_HEADER.size} to {_HEADER.size + MAX_MESSAGE_BYTES}"
        )
    found, size = _HEADER.unpack_from(message)
    if found != magic:
        raise WireError(f"a message starts with {found!r}, expected {magic!r}")
    if size != len(message) - _HEADER.size:
        raise WireError(f"a message announces {size} bytes and has {len(message) - _HEADER.size}")
    try:
        row = msgpack.unpackb(message[_HEADER.size :], strict_map_key=False, unicode_errors="surrogatepass")
    except (ValueError, TypeError, msgpack.UnpackException) as error:  # TypeError: a list as a key
        raise WireError(f"a message is not msgpack: {error}") from error
    if not isinstance(row, list) or len(row) != num_fields:
        raise WireError(f"a message must hold {num_fields} fields")
    return row
