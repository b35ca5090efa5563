"""Texts of grammars: llguidance's variant of Lark, within the JSON that it takes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..structured_params import check_depth
from .schema_limits import check_schema

MAX_RULES = 1000
"""llguidance needs stack for each rule that leads to the next, and a process that has none left ends."""

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
_SETTINGS = '\n%llguidance {"no_forcing": true}\n'
"""Masks have every token that fits, also where all texts go on in the same way: tokenising such a text takes long."""


def schema_grammar(schema: str) -> str:
    """A grammar for JSON of a schema, which is given as text. ValueError for a schema that is too large."""
    return _grammar(f"start: %json {_json_rule(json.loads(schema))}")


def choice_grammar(choices: Sequence[str]) -> str:
    """A grammar for one of some texts."""
    texts = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
    return _grammar(f"start: CHOICE\nCHOICE: {texts}")


def regex_grammar(regex: str) -> str:
    """A grammar for the texts that match a regular expression, whose slashes are escaped as in Lark."""
    return _grammar(f"start: /{regex}/")


def lark_grammar(text: str) -> str:
    """A grammar in Lark. Schemas in it (`%json {..}`) are checked, and their JSON has the white space of all others.

    ValueError for a schema that is no JSON object or too large, and for too many rules.
    """
    parts: list[str] = []
    end = num_rules = 0
    while (found := _INLINE_SCHEMA.search(text, end)) is not None:
        try:
            schema, after = json.JSONDecoder().raw_decode(text, found.end())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"%json is not followed by a JSON Schema ({error})") from error
        if not isinstance(schema, dict):
            raise ValueError("%json is not followed by a JSON Schema, which is an object")
        check_depth("the schema after %json", schema)
        num_rules += text.count(":", end, found.end())
        parts += [text[end : found.end()], _json_rule(schema)]
        end = after
    num_rules += text.count(":", end)
    if num_rules > MAX_RULES:
        raise ValueError(f"the grammar has {num_rules} rules (or colons), at most {MAX_RULES} are supported")
    return _grammar("".join([*parts, text[end:]]))


def _json_rule(schema: Mapping[str, Any]) -> str:
    if _OPTIONS in schema:
        raise ValueError(f"{_OPTIONS} in a schema is not supported; remove it")
    check_schema(schema)
    return json.dumps({**schema, _OPTIONS: _JSON_OPTIONS}, ensure_ascii=False)


def _grammar(lark: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": lark + _SETTINGS}]}, ensure_ascii=False)
