"""Errors in OpenAI's format."""

from __future__ import annotations

from typing import Any

MAX_MESSAGE_CHARS = 600


class ApiError(Exception):
    """Why a request cannot be answered: `code` is stable and for programs, `message` a sentence for people."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        """`param`: the field at fault. A message that quotes too much of a request is cut."""
        message = clipped(message, MAX_MESSAGE_CHARS)
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param

    def body(self, status_code: int) -> dict[str, Any]:
        """The body of a response. Below 500 the request is at fault, from 500 on the server."""
        kind = "invalid_request_error" if status_code < 500 else "error"
        return {"error": {"code": self.code, "message": self.message, "type": kind, "param": self.param}}


def clipped(text: str, max_chars: int) -> str:
    """The beginning of a text, for messages."""
    return text if len(text) <= max_chars else text[:max_chars] + "..."


def json_type(value: object) -> str:
    """The JSON type of a parsed value, with its article, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
