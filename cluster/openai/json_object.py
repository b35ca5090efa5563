"""Reads one JSON object from bytes that anybody may have written: a line of a batch file, the body of a request."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any, Literal

from .errors import ApiError, json_type

MAX_DEPTH = 100
MAX_INTEGER_DIGITS = 20

# A string (to its end or the end of the data) or one bracket; possessive, so that time is linear in the length.
_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)


def parse_object(data: bytes, *, place: Literal["line", "body"]) -> dict[str, Any]:
    """Parse a JSON object; ApiError for anything else. place: what messages call the data."""
    source = "the file" if place == "line" else "it"
    if data.startswith(b"\xef\xbb\xbf"):
        raise ApiError(
            "byte_order_mark", f"the {place} starts with a byte order mark; save {source} as UTF-8 without one"
        )
    if (position := data.find(b"\0")) >= 0:
        raise ApiError("nul_byte", f"byte {position + 1} of the {place} is NUL; {source} may be UTF-16 or damaged")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        message = f"byte {error.start + 1} of the {place} (0x{data[error.start]:02x}) is not valid UTF-8"
        raise ApiError("invalid_utf8", message) from error
    if _too_deep(data):
        raise ApiError("nested_too_deep", f"lists and objects are nested more than {MAX_DEPTH} levels deep")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_not_finite,
            parse_float=_float,
            parse_int=_integer,
        )
    except json.JSONDecodeError as error:
        raise ApiError("invalid_json", f"not JSON: {error.msg} (character {error.pos + 1} of the {place})") from error
    if not isinstance(value, dict):
        noun = "row" if place == "line" else place
        raise ApiError("not_an_object", f"a {noun} must be a JSON object, this one is {json_type(value)}")
    if "\\u" in text:
        _refuse_lone_surrogates(value)
    return value


def _too_deep(data: bytes) -> bool:
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return False
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(data):
        token = match.group()
        depth += 1 if token in b"[{" else -1 if token in b"]}" else 0
        if depth > MAX_DEPTH:
            return True
    return False


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ApiError("duplicate_key", f"the key {counts.most_common(1)[0][0]!r} appears more than once in one object")
    return value


def _not_finite(name: str) -> float:
    raise ApiError("non_finite_number", f"{name} is not a JSON number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ApiError("non_finite_number", f"the number {text[:40]} is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > MAX_INTEGER_DIGITS:
        raise ApiError(
            "number_too_large", f"a whole number has {len(text)} digits, at most {MAX_INTEGER_DIGITS} are read"
        )
    return int(text)


def _refuse_lone_surrogates(value: dict[str, Any]) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ApiError(
            "invalid_unicode", "a \\u escape is half of a surrogate pair, which is not a character"
        ) from error
