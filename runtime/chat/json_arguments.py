"""JSON text of a call's arguments, for grammars that write one value after the other."""

from __future__ import annotations

import json
from collections.abc import Callable


class JsonObjectWriter:
    """Builds a JSON object. Each method returns the characters that it adds, whole escapes only."""

    def __init__(self) -> None:
        self._num_keys = 0
        self._is_string = False
        self._pieces: list[str] = []

    def begin_value(self, key: str, *, is_string: bool) -> str:
        """Add a key. A string's text is added as it is written, any other value's when it is whole."""
        self._is_string = is_string
        return f'{self._key(key)}": ' + ('"' if is_string else "")

    def write(self, text: str) -> str:
        """Add text of the value."""
        if self._is_string:
            return _escape(text)
        self._pieces.append(text)
        return ""

    def end_value(self, is_json: Callable[[str], bool]) -> str:
        """Add a value that is no string yet: the text itself if `is_json`, else as a string."""
        if self._is_string:
            return '"'
        text = self._take_pieces()
        return text if is_json(text) else f'"{_escape(text)}"'

    def end(self) -> str:
        """Close the object."""
        return "}" if self._num_keys else "{}"

    def cut_key(self, key: str) -> str:
        """Add the beginning of a key that ends with the output."""
        return self._key(key)

    def cut_value(self) -> str:
        """Add the text of a value that ends with the output."""
        return self._take_pieces()

    def _key(self, key: str) -> str:
        self._num_keys += 1
        return ('{"' if self._num_keys == 1 else ', "') + _escape(key)

    def _take_pieces(self) -> str:
        text = "".join(self._pieces)
        self._pieces.clear()
        return text


class JsonStringScanner:
    """Whether JSON text ends inside a string."""

    def __init__(self) -> None:
        self.is_open = False
        self._is_escaped = False

    def scan(self, text: str) -> None:
        """Add text."""
        for character in text:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = self.is_open
            elif character == '"':
                self.is_open = not self.is_open


def json_type(text: str) -> str | None:
    """JSON Schema's name of a JSON value's type ("integer" if it has neither fraction nor exponent); None: no JSON."""
    try:
        json.loads(text, parse_int=str, parse_float=str, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    text = text.lstrip()
    by_first_character = {"{": "object", "[": "array", '"': "string", "t": "boolean", "f": "boolean", "n": "null"}
    number = "number" if any(c in text for c in ".eE") else "integer"
    return by_first_character.get(text[0], number)


def _escape(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _refuse_constant(name: str) -> None:
    raise ValueError(f"JSON has no {name}")
