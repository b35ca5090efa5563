"""One HTTP request for text: its prompts, the requests to the engines, and the answer, whole or as events."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from starlette.concurrency import run_in_threadpool

from shoal.runtime.tokenization.tokenizer import Tokenizer
from shoal.runtime.types import EngineOutput, Finished, Prefilled, RequestMetrics, RequestOutput, Tokens

from ..openai.errors import ApiError, json_type
from ..openai.fields import FORM_FIELDS, check_fields
from ..openai.requests import Endpoint, ParsedRequest, RequestDefaults, parse_chat, parse_completion, read_flag
from ..openai.responses import chat_completion, completion, failure
from ..openai.streams import ChatStream, CompletionStream, StreamHead, UsageOptions
from ..openai.usage import Usage, usage_of
from ..replicas.async_engines import AsyncEngines
from .http_errors import generation_failed

_STREAM_FIELDS = ("stream", "stream_options")
SHORT_BODY_BYTES = 2 << 10
"""A shorter body is checked faster than threads change, unless it has one of SLOW_FIELDS."""
SLOW_FIELDS = {"structured_outputs", "tools", *FORM_FIELDS}
_ID_PREFIX = {"/v1/chat/completions": "chatcmpl", "/v1/completions": "cmpl"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRequest:
    """A checked request."""

    head: StreamHead
    endpoint: Endpoint
    prompts: tuple[ParsedRequest, ...]
    """One for chat; completions may ask for several."""
    is_streamed: bool
    usage: UsageOptions

    @property
    def num_sequences(self) -> int:
        return sum(prompt.params.n for prompt in self.prompts)


async def read_request(
    endpoint: Endpoint,
    body: Mapping[str, Any],
    defaults: RequestDefaults,
    *,
    num_bytes: int,
    request_id: str,
    draw_seed: Callable[[], int],
    model: str,
    max_num_prompts: int,
) -> TextRequest:
    """Check a body of `num_bytes` bytes, in another thread where that takes long, so that streams go on.

    ApiError names what is wrong. `draw_seed`: for a request that samples and has none; 63 bits.
    """
    is_streamed, usage = _stream_options(body)
    own = {name: value for name, value in body.items() if name not in _STREAM_FIELDS}
    parse = parse_chat if endpoint == "/v1/chat/completions" else parse_completion
    bodies = [own] if endpoint == "/v1/chat/completions" else _split_prompts(own, max_num_prompts)
    if num_bytes <= SHORT_BODY_BYTES and len(bodies) == 1 and not SLOW_FIELDS & body.keys():
        prompts = [parse(own, defaults)]
    else:
        prompts = [await run_in_threadpool(parse, one, defaults) for one in bodies]
    seed = None
    if prompts[0].params.seed is None and prompts[0].params.temperature > 0:
        seed = draw_seed()
        params = msgspec.structs.replace(prompts[0].params, seed=seed)
        prompts = [replace(prompt, params=params) for prompt in prompts]
    return TextRequest(
        head=StreamHead(id=f"{_ID_PREFIX[endpoint]}-{request_id}", created=int(time.time()), model=model, seed=seed),
        endpoint=endpoint,
        prompts=tuple(prompts),
        is_streamed=is_streamed,
        usage=usage,
    )


class Answer:
    """The answer to a request, from the engines."""

    def __init__(self, request: TextRequest, engines: AsyncEngines, tokenizer: Tokenizer | None) -> None:
        """Queue the request."""
        self._request = request
        self._engines = engines
        self._tokenizer = tokenizer
        self.usage = Usage(num_prompt_tokens=sum(len(prompt.prompt_token_ids) for prompt in request.prompts))
        """The token counts, those of the output once an answer has ended."""
        self.finish_reasons: list[str] = []
        """Why each sample ended; fewer than there are samples for an answer that was given up."""
        self.metrics: RequestMetrics | None = None
        """When the last prompt got how far."""
        self.status_code = 499
        """The HTTP status, once the answer has ended; 499: the client left."""
        report = "step" if request.is_streamed else "interval"
        self._generations = [
            engines.generate(msgspec.structs.replace(prompt.to_request("", 0), report=report))
            for prompt in request.prompts
        ]

    def abort(self) -> None:
        """Drop what is not finished."""
        for generation in self._generations:
            self._engines.abort(generation)

    async def whole(self) -> dict[str, Any]:
        """The body of the response. HttpError for a failed one."""
        outputs = [await generation.whole() for generation in self._generations]
        for output, prompt in zip(outputs, self._request.prompts, strict=True):
            self._note(output, prompt)
        for output in outputs:
            if (error := failure(output)) is not None:
                self.status_code = 500
                raise generation_failed(error, self._request.head.id)
        write = chat_completion if self._request.endpoint == "/v1/chat/completions" else completion
        head = self._request.head
        bodies = [
            write(output, prompt, id=head.id, created=head.created, model=head.model, tokenizer=self._tokenizer)
            for output, prompt in zip(outputs, self._request.prompts, strict=True)
        ]
        body = _joined(bodies) | {"usage": self.usage.body()}
        self.status_code = 200
        return body if head.seed is None else body | {"seed": head.seed}

    def _note(self, output: RequestOutput, prompt: ParsedRequest) -> None:
        """Keep what is told of a finished prompt."""
        if self.metrics is None:
            self.usage = Usage()  # the prompts count as they finish
        self.usage += usage_of(output, prompt) + Usage(num_cached_tokens=output.num_cached_tokens)
        self.finish_reasons += [str(sample.finish_reason) for sample in output.outputs]
        self.metrics = output.metrics

    async def events(self) -> AsyncIterator[list[dict[str, Any]]]:
        """Bodies of events, all that are there at a time. A failure is a last event with `error`."""
        streams = [self._stream(prompt) for prompt in self._request.prompts]
        yield [event for stream in streams for event in stream.begin()]
        offset = 0
        for stream, generation, prompt in zip(streams, self._generations, self._request.prompts, strict=True):
            last: EngineOutput | RequestOutput | None = None
            while not isinstance(last, RequestOutput):
                try:
                    outputs = await generation.next()
                except Exception as error:  # of the engines: what was sent stays sent
                    yield [self._failed(ApiError("engine_failed", f"{type(error).__name__}: {error}"))]
                    return
                yield [_shifted(event, offset) for event in _events_of(stream, outputs)]
                last = outputs[-1]
            self._note(last, prompt)
            if (reason := failure(last)) is not None:
                yield [self._failed(reason)]
                return
            offset += prompt.params.n
        yield streams[-1].end(sum((stream.usage for stream in streams), Usage()))
        self.status_code = 200

    def _failed(self, error: ApiError) -> dict[str, Any]:
        self.status_code = 500
        return generation_failed(error, self._request.head.id).error.body(500)

    def _stream(self, prompt: ParsedRequest) -> CompletionStream:
        kind = ChatStream if self._request.endpoint == "/v1/chat/completions" else CompletionStream
        return kind(prompt, self._request.head, tokenizer=self._tokenizer, usage=self._request.usage)


def _events_of(stream: CompletionStream, outputs: Sequence[object]) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    for output in outputs:
        if isinstance(output, Tokens):
            events += stream.add(output)
        elif isinstance(output, Prefilled):
            events += stream.prefill(output)
        elif isinstance(output, Finished) and output.reason not in ("error", "abort"):
            events += stream.finish(output)
    return events


def _stream_options(body: Mapping[str, Any]) -> tuple[bool, UsageOptions]:
    is_streamed = read_flag(body, "stream")
    options = body.get("stream_options")
    if options is None:
        return is_streamed, UsageOptions()
    if not is_streamed:
        raise ApiError("invalid_parameter", "stream_options needs stream: true", "stream_options")
    if not isinstance(options, Mapping):
        message = f"stream_options must be an object, got {json_type(options)}"
        raise ApiError("invalid_type", message, "stream_options")
    check_fields(options, ("include_usage", "continuous_usage_stats"), "stream_options.")
    for name, value in options.items():
        if not isinstance(value, bool | None):
            message = f"stream_options.{name} must be true or false, got {json_type(value)}"
            raise ApiError("invalid_type", message, f"stream_options.{name}")
    return True, UsageOptions(**{name: bool(value) for name, value in options.items()})


def _split_prompts(body: Mapping[str, Any], max_num_prompts: int) -> list[dict[str, Any]]:
    """One body per prompt: `prompt` may be a list of texts or of lists of token ids."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > max_num_prompts:
            message = f"prompt has {len(prompt)} prompts, at most {max_num_prompts} are taken (max_num_queued_reqs)"
            raise ApiError("invalid_parameter", message, "prompt")
        return [{**body, "prompt": one} for one in prompt]
    return [dict(body)]


def _joined(bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One response to several prompts, whose usage is that of the first: the choices of the first come first."""
    joined = dict(bodies[0])
    choices = [choice for body in bodies for choice in body["choices"]]
    joined["choices"] = [{**choice, "index": index} for index, choice in enumerate(choices)]
    return joined


def _shifted(event: dict[str, Any], offset: int) -> dict[str, Any]:
    """The event of a later prompt, whose choices follow those of the prompts before."""
    if not offset:
        return event
    return event | {"choices": [{**choice, "index": choice["index"] + offset} for choice in event["choices"]]}
