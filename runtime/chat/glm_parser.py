"""Outputs of GLM-4.6 to 5.3.

<tool_call>tide_height<arg_key>port</arg_key><arg_value>Brest</arg_value></tool_call>
"""

from __future__ import annotations

from collections.abc import Mapping

from .declared_types import STRING, Types, is_value, parameter_types
from .grammar_parser import GrammarParser, ParserOptions
from .json_arguments import JsonObjectWriter
from .white_space import ContentHolder, StrippedContent, VerbatimContent

_CALL_BEGIN = "<tool_call>"
_CALL_END = "</tool_call>"
_KEY_BEGIN = "<arg_key>"
_KEY_END = "</arg_key>"
_VALUE_BEGIN = "<arg_value>"
_VALUE_END = "</arg_value>"


class GlmParser(GrammarParser):
    """The declared types of the tools' parameters decide which values are strings; text after calls is content."""

    tokens = (_CALL_BEGIN, _CALL_END, _KEY_BEGIN, _KEY_END, _VALUE_BEGIN, _VALUE_END)
    openers = (_CALL_BEGIN,)

    def __init__(self, options: ParserOptions) -> None:
        super().__init__(options)
        self._types_of_tools = parameter_types(options.tools)
        self._name_ends = self._reader.tag_set(_KEY_BEGIN, _CALL_END)
        self._key_ends = self._reader.tag_set(_KEY_END)
        self._value_begins = self._reader.tag_set(_VALUE_BEGIN, _KEY_BEGIN, _CALL_END)
        self._value_ends = self._reader.tag_set(_VALUE_END)
        self._types_of_tool: Mapping[str, Types | None] = {}
        self._types: Types | None = None
        self._object = JsonObjectWriter()
        self._after_value: list[str] = []

    def _make_content_holder(self) -> ContentHolder:
        return StrippedContent() if self._options.parse_tools else VerbatimContent()

    def _begin_calls(self, opener: str) -> None:
        self._state = self._name

    def _name(self) -> bool:
        read = self._read_up_to(self._name_ends)
        if read is None:
            return False
        name, tag = read
        self._begin_call_of(name.strip())
        self._end_argument(tag)
        return True

    def _key(self) -> bool:
        read = self._read_up_to(self._key_ends)
        if read is None:
            return False
        self._types = self._types_of_tool.get(read[0])
        self._emit_arguments(self._object.begin_value(read[0], is_string=self._types == STRING))
        self._state = self._before_value
        return True

    def _before_value(self) -> bool:
        tag = self._read_tag(self._value_begins)
        if tag is None:
            return False
        if tag == _VALUE_BEGIN:
            self._state = self._value
        else:
            self.is_malformed = True
            self._end_value(tag)
        return True

    def _value(self) -> bool:
        event = self._reader.read(self._value_ends)
        if event is None:
            return False
        text, tag = event
        self._emit_arguments(self._object.write(text))
        if tag:
            self._after_value.append(tag)
            self._state = self._value_end
        return True

    def _value_end(self) -> bool:
        """After `</arg_value>`, which ends the value only before the next key or the end of the call."""
        self._after_value.append(self._reader.read_space())
        tag = None if self._is_finished else self._reader.match(self._name_ends)
        if tag is None:
            return False
        if tag:
            self._end_value(tag)
        else:
            self._emit_arguments(self._object.write("".join(self._after_value)))
            self._state = self._value
        self._after_value.clear()
        return True

    def _end_value(self, tag: str) -> None:
        self._emit_arguments(self._object.end_value(self._is_value))
        self._end_argument(tag)

    def _end_argument(self, tag: str) -> None:
        """Go on to the next key, or end the call."""
        if tag == _KEY_BEGIN:
            self._state = self._key
        else:
            self._emit_arguments(self._object.end())
            self._state = self._content

    def _is_value(self, text: str) -> bool:
        return is_value(text, self._types)

    def _begin_call_of(self, name: str) -> None:
        self._begin_call(name)
        self._types_of_tool = self._types_of_tools.get(name, {})
        self._object = JsonObjectWriter()

    def _end_cut_call(self) -> None:
        rest = self._take_pieces()
        if self._state == self._name and rest.strip():
            self._begin_call_of(rest.strip())
        elif self._state == self._key and rest:
            self._emit_arguments(self._object.cut_key(rest))
        elif self._state == self._value:
            self._emit_arguments(self._object.cut_value())
        elif self._state == self._value_end:
            self._emit_arguments(self._object.end_value(self._is_value))
