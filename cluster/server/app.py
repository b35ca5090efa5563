"""The routes of `shoal serve`."""

from __future__ import annotations

import hmac
import random
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import shoal

from ..metrics.prometheus import PrometheusInstruments
from ..openai.errors import ApiError
from ..openai.fields import shown
from ..openai.requests import Endpoint, RequestDefaults
from .bodies import MAX_PENDING_BYTES, BodyReader
from .events import EventStream, until_disconnect
from .generation import Answer, read_request
from .http_errors import HttpError, bad_request, not_found, queue_full, unavailable
from .request_log import RequestLog
from .state import ServerState
from .tokenizing import detokenize, tokenize, tokenizer_info

Handler = Callable[[Request], Awaitable[ASGIApp]]
OPEN_PATHS = ("/live", "/health")
"""Routes that need no key."""
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """A model and what its requests are checked against."""

    names: Sequence[str]
    """Names in requests; the first is that of answers."""
    root: str
    created: int
    defaults: RequestDefaults


class Api:
    """Handlers of the routes."""

    def __init__(
        self,
        model: ServedModel,
        state: ServerState,
        *,
        max_num_queued_reqs: int,
        metrics: PrometheusInstruments,
        log: RequestLog,
        max_pending_bytes: int = MAX_PENDING_BYTES,
    ) -> None:
        self._model = model
        self._metrics = metrics
        self._log = log
        self._state = state
        self._max_num_queued_reqs = max_num_queued_reqs
        self._bodies = BodyReader(max_pending_bytes)
        # The system's random numbers let other threads run, for milliseconds, each time.
        self._random = random.Random(secrets.randbits(256))

    async def live(self, request: Request) -> Response:
        return json_response({"status": "live"})

    async def health(self, request: Request) -> Response:
        status = self._state.status
        if status == "ready":
            return json_response({"status": status})
        return json_response({"status": status, "reason": self._state.reason}, status_code=503)

    async def version(self, request: Request) -> Response:
        return json_response({"version": shoal.__version__})

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._model_card(name) for name in self._model.names]})

    async def one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._check_model(name)
        return json_response(self._model_card(name))

    async def chat_completions(self, request: Request) -> Response | EventStream:
        return await self._generate("/v1/chat/completions", request)

    async def completions(self, request: Request) -> Response | EventStream:
        return await self._generate("/v1/completions", request)

    async def tokenize(self, request: Request) -> Response:
        return await self._use_tokenizer(tokenize, request)

    async def detokenize(self, request: Request) -> Response:
        return await self._use_tokenizer(detokenize, request)

    async def tokenizer_info(self, request: Request) -> Response:
        return json_response(tokenizer_info(self._model.root, self._model.defaults))

    async def _use_tokenizer(
        self, use: Callable[[Mapping[str, Any], RequestDefaults], dict[str, Any]], request: Request
    ) -> Response:
        async with self._bodies.read(request) as (body, _):
            self._check_model(body.get("model"))
            return json_response(await run_in_threadpool(use, body, self._model.defaults))

    async def metrics(self, request: Request) -> Response:
        if self._state.engines is not None and self._state.status != "dead":
            await self._state.engines.look()
        body, content_type = self._metrics.render(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    async def _generate(self, endpoint: Endpoint, http: Request) -> Response | EventStream:
        try:
            answer, is_streamed = await self._begin(endpoint, http)
        except (ApiError, HttpError) as error:
            refusal = error if isinstance(error, HttpError) else bad_request(error)
            self._log.refused(http, refusal)
            raise refusal from error

        def end() -> None:
            answer.abort()
            self._log.ended(http, answer)

        if is_streamed:
            return EventStream(answer.events(), headers={"X-Request-Id": http.state.request_id}, close=end)
        try:
            return json_response(await until_disconnect(http.receive, answer.whole()))
        finally:
            end()

    async def _begin(self, endpoint: Endpoint, http: Request) -> tuple[Answer, bool]:
        """The answer to a request that can be answered, and whether it is streamed."""
        engines = self._state.engines
        if self._state.status not in ("ready", "stalled") or engines is None:
            raise unavailable(self._state.reason)
        async with self._bodies.read(http) as (body, num_bytes):
            self._check_model(body.get("model"))
            request = await read_request(
                endpoint,
                body,
                self._model.defaults,
                num_bytes=num_bytes,
                request_id=http.state.request_id,
                draw_seed=lambda: self._random.getrandbits(63),
                model=self._model.names[0],
                max_num_prompts=self._max_num_queued_reqs,
            )
        if engines.num_sequences + request.num_sequences > self._max_num_queued_reqs:
            raise queue_full(self._max_num_queued_reqs)
        return Answer(request, engines, self._model.defaults.tokenizer), request.is_streamed

    def _check_model(self, name: object) -> None:
        if name is not None and name not in self._model.names:
            known = ", ".join(self._model.names)
            raise not_found(f"the model {shown(name)} is not served here; give {known}", "model_not_found", "model")

    def _model_card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._model.created,
            "owned_by": "shoal",
            "root": self._model.root,
            "max_model_len": self._model.defaults.limits.max_model_len,
        }


def make_app(api: Api, *, keys: Sequence[str] = ()) -> ASGIApp:
    """The ASGI application. keys: one of them is needed for all routes but `OPEN_PATHS`; none: nothing is."""
    routes = [
        _route("/live", api.live),
        _route("/health", api.health),
        _route("/version", api.version),
        _route("/metrics", api.metrics),
        _route("/v1/models", api.models),
        _route("/v1/models/{name:path}", api.one_model),
        _route("/v1/chat/completions", api.chat_completions, "POST"),
        _route("/v1/completions", api.completions, "POST"),
        _route("/tokenize", api.tokenize, "POST"),
        _route("/detokenize", api.detokenize, "POST"),
        _route("/tokenizer_info", api.tokenizer_info),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _http_exception, Exception: _failed})
    app.router.redirect_slashes = False  # an unknown path is an error, and a redirect would repeat the Host header
    return _RequestIds(_Keys(app, keys), random.Random(secrets.randbits(256)))


def json_response(body: object, *, status_code: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status_code, headers, media_type="application/json")


def error_response(error: HttpError) -> Response:
    """An error in OpenAI's format."""
    return json_response(error.error.body(error.status_code), status_code=error.status_code, headers=error.headers)


def _route(path: str, handler: Handler, method: str = "GET") -> Route:
    return Route(path, _Endpoint(handler), methods=[method])


class _Endpoint:
    """A route's application. Without Starlette's own around a handler, which all events would pass through."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response: ASGIApp
        try:
            response = await self._handler(Request(scope, receive))
        except HttpError as error:
            response = error_response(error)
        except ApiError as error:
            response = error_response(bad_request(error))
        except ClientDisconnect:
            response = Response(status_code=499)  # nobody reads it
        await response(scope, receive, send)


async def _http_exception(request: Request, error: Exception) -> Response:
    """Paths and methods that no route has."""
    assert isinstance(error, HTTPException)
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    message = f"{request.method} {request.scope['path'][:200]}: {error.detail}"
    return error_response(HttpError(error.status_code, ApiError(code, message), dict(error.headers or {})))


async def _failed(request: Request, error: Exception) -> Response:
    return error_response(HttpError(500, ApiError("internal_error", f"{type(error).__name__}: {error}")))


class _RequestIds:
    """Gives every request an id, which the response has too: the client's X-Request-Id if it is a plain one."""

    def __init__(self, app: ASGIApp, random_numbers: random.Random) -> None:
        self._app = app
        self._random = random_numbers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"{self._random.getrandbits(128):032x}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Any) -> None:
            if message["type"] == "http.response.start":
                others = [header for header in message["headers"] if header[0] != b"x-request-id"]
                message["headers"] = [*others, (b"x-request-id", request_id.encode())]
            await send(message)

        await self._app(scope, receive, send_with_id)


class _Keys:
    """Refuses requests without one of the keys."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys and scope["path"] not in OPEN_PATHS and not self._has_key(scope):
            error = HttpError(401, ApiError("invalid_api_key", "give one of the server's keys: Authorization: Bearer"))
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        if scheme != b"Bearer":
            return False
        matches = [hmac.compare_digest(given, key) for key in self._keys]  # all: the time says nothing about them
        return True in matches
