"""Texts of grammars, in llguidance's variant of Lark and its JSON around grammars."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .schema_limits import check_schema

_OPTIONS = "x-guidance"
_JSON_OPTIONS = {
    "item_separator": ", ?",
    "key_separator": ": ?",
    "whitespace_flexible": False,
    "coerce_one_of": False,
    "lenient": False,
}
"""One space at most after `,` and `:`, no other white space: a weak model could repeat it for ever."""
_INLINE_SCHEMA = re.compile(r"%json\s*")


def schema_grammar(schema: str) -> str:
    """A grammar for JSON of a schema, which is given as text. ValueError for a schema that is too large."""
    return _grammar({"json_schema": _with_options(json.loads(schema))})


def choice_grammar(choices: Sequence[str]) -> str:
    """A grammar for one of some texts."""
    texts = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
    return _grammar({"lark_grammar": f"start: CHOICE\nCHOICE: {texts}\n"})


def lark_grammar(text: str) -> str:
    """A grammar in Lark. Schemas in it (`%json {..}`) are checked, and their JSON has the white space of all others.

    ValueError for a schema that is no JSON object or too large.
    """
    parts: list[str] = []
    end = 0
    while (found := _INLINE_SCHEMA.search(text, end)) is not None:
        try:
            schema, after = json.JSONDecoder().raw_decode(text, found.end())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"%json is not followed by a JSON Schema ({error})") from error
        if not isinstance(schema, dict):
            raise ValueError("%json is not followed by a JSON Schema, which is an object")
        parts += [text[end : found.end()], json.dumps(_with_options(schema), ensure_ascii=False)]
        end = after
    return _grammar({"lark_grammar": "".join([*parts, text[end:]])})


def _with_options(schema: Mapping[str, Any]) -> dict[str, Any]:
    if _OPTIONS in schema:
        raise ValueError(f"{_OPTIONS} in a schema is not supported; remove it")
    check_schema(schema)
    return {**schema, _OPTIONS: _JSON_OPTIONS}


def _grammar(grammar: Mapping[str, Any]) -> str:
    return json.dumps({"grammars": [grammar]}, ensure_ascii=False)
