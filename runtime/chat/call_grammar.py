"""Grammars of answers that call tools, in llguidance's variant of Lark: what the parsers of this package read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..tokenization.tokenizer import (
    TOOL_CALL_BEGIN,
    TOOL_CALL_END,
    TOOL_CALLS_BEGIN,
    TOOL_CALLS_END,
    TOOL_SEP,
    Tokenizer,
)
from .declared_types import STRING, declared_types, resolved
from .dsml_parsers import DeepSeekV4Parser, DeepSeekV32Parser
from .kimi_parser import KimiParser
from .parsers import PARSERS, tag_tokens

_DEFINITIONS = ("$defs", "definitions")
_STRING_LIMITS = ("pattern", "format", "minLength", "maxLength")


@dataclass(frozen=True, kw_only=True, slots=True)
class CallRules:
    """Which calls an answer has."""

    is_required: bool
    """The answer is calls and nothing else; otherwise it may begin with text, and may be nothing but text."""
    name: str | None = None
    """The one tool that is called; None: any."""
    is_parallel: bool = True
    """Whether there may be several calls."""


def call_grammar(
    grammar: str,
    tools: Sequence[Mapping[str, Any]],
    rules: CallRules,
    tokenizer: Tokenizer,
    *,
    text: str | None = None,
) -> str:
    """The Lark grammar of an answer to a prompt that shows `tools`, OpenAI's objects, in a format with this grammar.

    text: what a rule for an answer without calls has on its right side; None: any text, before calls too.
    The arguments of every call are valid by the tool's schema. ValueError for a tool or a schema that cannot be
    written in the format.
    """
    functions = [tool["function"] for tool in tools]
    if rules.name is not None:
        functions = [function for function in functions if function["name"] == rules.name]
        if not functions:
            raise ValueError(f"tool_choice names {rules.name!r}, which is not among the tools")
    tags = _Tags(grammar, tokenizer)
    writer = _WRITERS[grammar](tags)
    calls = writer.after_opener(functions, several=rules.is_parallel and rules.name is None)
    calls_alone = _join(tags(writer.before_opener + writer.opener), calls)
    if rules.is_required:
        start = [f"start: {calls_alone}"]
    elif text is not None:
        start = [f"start: answer | {calls_alone}", f"answer: {text}"]
    else:
        start = _text_or_calls(writer.opener, calls, PARSERS[grammar].openers, tags)
    return "\n".join([*start, *writer.rules])


def _text_or_calls(opener: str, calls: str, openers: Sequence[str], tags: _Tags) -> list[str]:
    """Rules for text, or calls with or without text before them."""
    before, after = tags.split(opener)
    if not before:
        return [f"start: TEXT? ({after} {calls})?", "TEXT: /(?s:.+)/"]
    # The text before calls and the beginning of their tag are one lexeme, as a longer text may not have to be undone.
    ways = [f"start: TEXT? | opening {_join(after, calls)}"]
    if after:
        return [*ways, "TEXT: /(?s:.+)/", f"opening: /(?s:.*){_escaped(before)}/"]
    calls_begin = "|".join(map(_escaped, openers))
    text = f"TEXT: /(?s:.+)/ & ~/(?s:.*)({calls_begin})(?s:.*)/"
    return [*ways, text, f"opening[lazy]: /(?s:.*){_escaped(before)}/"]


class _Tags:
    """Texts of a format as Lark: added tokens by their ids, all else as strings."""

    def __init__(self, grammar: str, tokenizer: Tokenizer) -> None:
        self._ids = {tag: i for tag in tag_tokens(grammar) if (i := tokenizer.special_id(tag)) is not None}
        self._tag = re.compile("|".join(map(re.escape, self._ids)) or "(?!)")

    def __call__(self, text: str) -> str:
        parts: list[str] = []
        end = 0
        for match in self._tag.finditer(text):
            parts += [_quoted(text[end : match.start()]), f"<[{self._ids[match.group()]}]>"]
            end = match.end()
        return " ".join(filter(None, [*parts, _quoted(text[end:])]))

    def split(self, text: str) -> tuple[str, str]:
        """The text before the first added token, and the rest as Lark."""
        match = self._tag.search(text)
        return (text, "") if match is None else (text[: match.start()], self(text[match.start() :]))


class _Writer:
    """Writes the calls of one format, and collects the rules that they refer to."""

    opener: ClassVar[str]
    """What begins the calls."""
    before_opener: ClassVar[str] = ""
    """White space that models write before it."""

    def __init__(self, tags: _Tags) -> None:
        self._tags = tags
        self.rules: list[str] = []

    def after_opener(self, functions: Sequence[Mapping[str, Any]], *, several: bool) -> str:
        """What follows the opener for one call or, if there may be several, for one or more."""
        raise NotImplementedError

    def _one_of(self, functions: Sequence[Mapping[str, Any]]) -> str:
        """A rule for one call of any of the tools."""
        return self._rule(" | ".join(self._call(function) for function in functions))

    def _call(self, function: Mapping[str, Any]) -> str:
        raise NotImplementedError

    def _rule(self, body: str) -> str:
        name = f"r{len(self.rules)}"
        self.rules.append(f"{name}: {body}")
        return name

    def _json(self, schema: Mapping[str, Any]) -> str:
        return self._rule(f"%json {json.dumps(schema, ensure_ascii=False)}")

    def _text_until(self, end: str) -> str:
        """Any text that does not contain `end`, and `end`."""
        before, after = self._tags.split(end)
        name = f"text{len(self.rules)}"
        lazy = "" if after else "[lazy]"
        self.rules.append(f"{name}{lazy}: /(?s:.*){_escaped(before)}/")
        return _join(name, after)


class _Section(_Writer):
    """A section of calls with ends."""

    closer: ClassVar[str]
    separator: ClassVar[str] = ""
    """Between two calls."""

    def after_opener(self, functions: Sequence[Mapping[str, Any]], *, several: bool) -> str:
        call = self._one_of(functions)
        further = f"({_join(_quoted(self.separator), call)})*" if several else ""
        return _join(call, further, self._tags(self.closer))


class _DeepSeekV31(_Section):
    opener = TOOL_CALLS_BEGIN
    closer = TOOL_CALLS_END

    def _call(self, function: Mapping[str, Any]) -> str:
        begin = self._tags(f"{TOOL_CALL_BEGIN}{function['name']}{TOOL_SEP}")
        return _join(begin, self._json(_parameters(function)), self._tags(TOOL_CALL_END))


class _DeepSeekV3(_DeepSeekV31):
    separator = "\n"

    def _call(self, function: Mapping[str, Any]) -> str:
        begin = self._tags(f"{TOOL_CALL_BEGIN}function{TOOL_SEP}{function['name']}\n```json\n")
        return _join(begin, self._json(_parameters(function)), self._tags(f"\n```{TOOL_CALL_END}"))


class _Kimi(_Section):
    opener = KimiParser.openers[0]
    closer = KimiParser.calls_end

    def _call(self, function: Mapping[str, Any]) -> str:
        begin = self._tags(f"{KimiParser.call_begin}functions.{function['name']}:")
        number = "/0|[1-9][0-9]{0,3}/"
        arguments = self._json(_parameters(function))
        return _join(begin, number, self._tags(KimiParser.separator), arguments, self._tags(KimiParser.call_end))


class _Dsml(_Section):
    """Parameters come in the order of the schema, without those that are not required where the model omits them."""

    opener = DeepSeekV32Parser.block_begin + "\n"
    before_opener = "\n\n"
    closer = DeepSeekV32Parser.block_end

    def _call(self, function: Mapping[str, Any]) -> str:
        begin = self._tags(f'<｜DSML｜invoke name="{function["name"]}">\n')
        parameters = [self._parameter(name, schema, needed) for name, schema, needed in _properties(function)]
        return _join(begin, *parameters, self._tags("</｜DSML｜invoke>\n"))

    def _parameter(self, name: str, schema: Mapping[str, Any], is_required: bool) -> str:
        end = "</｜DSML｜parameter>\n"
        begin = f'<｜DSML｜parameter name="{name}" string='
        texts = _texts(schema)
        if texts is not None:
            body = _join(self._tags(f'{begin}"true">'), _alternatives(texts), self._tags(end))
        elif _is_plain_text(schema):
            body = _join(self._tags(f'{begin}"true">'), self._text_until(end))
        else:
            body = _join(self._tags(f'{begin}"false">'), self._json(schema), self._tags(end))
        return self._rule(body) + ("" if is_required else "?")


class _DsmlV4(_Dsml):
    opener = DeepSeekV4Parser.block_begin + "\n"
    closer = DeepSeekV4Parser.block_end


class _Glm(_Writer):
    """As `_Dsml`; the declared type of a parameter decides how its value is written."""

    opener = "<tool_call>"

    def after_opener(self, functions: Sequence[Mapping[str, Any]], *, several: bool) -> str:
        call = self._one_of(functions)
        return f'{call} ("\\n"? {self._tags(self.opener)} {call})*' if several else call

    def _call(self, function: Mapping[str, Any]) -> str:
        parameters = [self._parameter(function, name, schema, needed) for name, schema, needed in _properties(function)]
        return _join(_quoted(function["name"]), '"\\n"?', *parameters, self._tags("</tool_call>"))

    def _parameter(self, function: Mapping[str, Any], name: str, schema: Mapping[str, Any], is_required: bool) -> str:
        end = "</arg_value>"
        texts = _texts(schema)
        types = declared_types(schema, schema)
        if texts is not None:
            value = _join(_alternatives(texts), self._tags(end))
        elif types is None or "string" in types:
            if function.get("strict") and not _is_plain_text(schema):
                raise ValueError(
                    f"the parameter {name} of the strict tool {function['name']} has a form that this model's chat "
                    "format cannot promise; use an enum, or leave strict out"
                )
            value = self._text_until(end)
        else:
            value = _join(self._json(schema), self._tags(end))
        key = self._tags(f"<arg_key>{name}</arg_key>")
        body = _join(key, '"\\n"?', self._tags("<arg_value>"), value, '"\\n"?')
        return self._rule(body) + ("" if is_required else "?")


_WRITERS: Mapping[str, type[_Writer]] = {
    "deepseek_v3": _DeepSeekV3,
    "deepseek_v31": _DeepSeekV31,
    "deepseek_v32": _Dsml,
    "deepseek_v4": _DsmlV4,
    "kimi": _Kimi,
    "glm": _Glm,
}


def _parameters(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a tool's arguments, which are an object; a tool that declares none has none."""
    schema = function.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}
    return schema if "type" in schema or "$ref" in schema else {"type": "object", **schema}


def _properties(function: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], bool]]:
    """Name, schema and whether it is required, of every parameter of a tool."""
    schema = _parameters(function)
    properties = schema.get("properties", {})
    if schema.get("type") != "object" or not isinstance(properties, Mapping):
        raise ValueError(
            f"the parameters of the tool {function['name']} must be an object with properties: this model's chat "
            "format writes a call as one value per property"
        )
    shared = {name: schema[name] for name in _DEFINITIONS if name in schema}
    required = schema.get("required", [])
    found: list[tuple[str, Mapping[str, Any], bool]] = []
    for name, own in properties.items():
        if any(character in name for character in '"<>\n'):
            raise ValueError(f"the parameter {name!r} of the tool {function['name']} has a name that cannot be written")
        found.append((name, {**resolved(own, schema), **shared}, name in required))
    return found


def _texts(schema: Mapping[str, Any]) -> list[str] | None:
    """The texts that a schema allows, if it lists them."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list) and values and all(isinstance(value, str) and value for value in values):
        return values
    return None


def _is_plain_text(schema: Mapping[str, Any]) -> bool:
    """Whether every text is valid."""
    return declared_types(schema, schema) == STRING and not any(limit in schema for limit in _STRING_LIMITS)


def _escaped(text: str) -> str:
    """A regular expression for a text, between the slashes of Lark."""
    return re.sub(r"[\\.+*?()|\[\]{}^$/]", r"\\\g<0>", text).replace("\n", "\\n")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _alternatives(texts: Sequence[str]) -> str:
    return f"({' | '.join(map(_quoted, texts))})"


def _join(*parts: str) -> str:
    return " ".join(filter(None, parts))
