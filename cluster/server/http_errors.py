"""Errors of a request as HTTP responses, in OpenAI's format."""

from __future__ import annotations

from collections.abc import Mapping

from ..openai.errors import ApiError


class HttpError(Exception):
    """A request that is not answered: an HTTP status, the reason, and headers."""

    def __init__(self, status_code: int, error: ApiError, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(error.message)
        self.status_code = status_code
        self.error = error
        self.headers = dict(headers or {})


def bad_request(error: ApiError) -> HttpError:
    """An error of a request's fields."""
    return HttpError(400, error)


def not_found(what: str, code: str = "not_found", param: str | None = None) -> HttpError:
    return HttpError(404, ApiError(code, what, param))


def unavailable(reason: str) -> HttpError:
    """The server does not take requests now."""
    return HttpError(503, ApiError("unavailable", reason), {"Retry-After": "1"})


def queue_full(limit: int) -> HttpError:
    message = f"{limit} sequences are running or waiting, which is the limit (max_num_queued_reqs); try again later"
    return HttpError(429, ApiError("queue_full", message), {"Retry-After": "1"})


def generation_failed(error: ApiError, request_id: str) -> HttpError:
    """A failure of the engine."""
    return HttpError(500, ApiError(error.code, f"{error.message} (request {request_id})"))
