"""Outputs of DeepSeek-V3.2 and V4: calls in DSML.

<｜DSML｜function_calls>
<｜DSML｜invoke name="tide_height">
<｜DSML｜parameter name="port" string="true">Brest</｜DSML｜parameter>
<｜DSML｜parameter name="hour" string="false">12</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜function_calls>
"""

from __future__ import annotations

from typing import ClassVar

from .grammar_parser import GrammarParser, ParserOptions
from .json_arguments import JsonObjectWriter, json_type
from .white_space import SpaceHolder

_INVOKE_BEGIN = '<｜DSML｜invoke name="'
_INVOKE_END = "</｜DSML｜invoke>"
_PARAMETER_BEGIN = '<｜DSML｜parameter name="'
_PARAMETER_END = "</｜DSML｜parameter>"
_NAME_END = '">'
_STRING_NAME_END = '" string="true">'
_JSON_NAME_END = '" string="false">'
# One blank line before the calls belongs to them.
_BLANK_LINE = "\n\n"


class DeepSeekV32Parser(GrammarParser):
    """Arguments become a JSON object: strings as they are written, other values when they are whole.

    An invoke without a block, an invoke or a block that is not closed, and JSON text in place of parameters are
    accepted.
    """

    tokens = ("｜DSML｜",)
    block_begin: ClassVar[str] = "<｜DSML｜function_calls>"
    block_end: ClassVar[str] = "</｜DSML｜function_calls>"
    openers = (_BLANK_LINE + block_begin, block_begin, _BLANK_LINE + _INVOKE_BEGIN, _INVOKE_BEGIN)

    def __init__(self, options: ParserOptions) -> None:
        super().__init__(options)
        tag_set = self._reader.tag_set
        self._block_tags = tag_set(_INVOKE_BEGIN, self.block_end)
        self._name_ends = tag_set(_NAME_END)
        self._invoke_tags = tag_set(_PARAMETER_BEGIN, _INVOKE_END, _INVOKE_BEGIN, self.block_end)
        self._json_begin = tag_set("{")
        self._json_ends = tag_set(_INVOKE_END)
        self._key_ends = tag_set(_STRING_NAME_END, _JSON_NAME_END, _NAME_END)
        self._value_ends = tag_set(_PARAMETER_END)
        self._is_in_block = False
        self._object = JsonObjectWriter()
        self._json_space = SpaceHolder()

    def _begin_calls(self, opener: str) -> None:
        self._is_in_block = opener.endswith(self.block_begin)
        self.is_malformed |= not self._is_in_block
        self._state = self._block if self._is_in_block else self._invoke_name

    def _block(self) -> bool:
        tag = self._read_tag(self._block_tags)
        if tag is None:
            return False
        self._state = self._invoke_name if tag == _INVOKE_BEGIN else self._after_calls
        return True

    def _invoke_name(self) -> bool:
        read = self._read_up_to(self._name_ends)
        if read is None:
            return False
        self._begin_call(read[0])
        self._object = JsonObjectWriter()
        self._state = self._body
        return True

    def _body(self) -> bool:
        """The beginning of an invoke, where a JSON object may stand in place of parameters."""
        self._reader.read_space()
        tag = None if self._is_finished else self._reader.match(self._json_begin)
        if tag is None:
            return False
        if tag:
            self.is_malformed = True
            self._emit_arguments(tag)
        self._state = self._json if tag else self._parameters
        return True

    def _json(self) -> bool:
        event = self._reader.read(self._json_ends)
        if event is None:
            return False
        text, tag = event
        self._emit_arguments(self._json_space.write(text))
        if tag:
            self._json_space.take()
            self._state = self._block if self._is_in_block else self._after_calls
        return True

    def _parameters(self) -> bool:
        tag = self._read_tag(self._invoke_tags)
        if tag is None:
            return False
        if tag == _PARAMETER_BEGIN:
            self._state = self._key
            return True
        self._emit_arguments(self._object.end())
        self.is_malformed |= tag != _INVOKE_END
        if tag == _INVOKE_BEGIN:
            self._state = self._invoke_name
        elif tag == _INVOKE_END and self._is_in_block:
            self._state = self._block
        else:
            self._state = self._after_calls
        return True

    def _key(self) -> bool:
        read = self._read_up_to(self._key_ends)
        if read is None:
            return False
        key, tag = read
        self.is_malformed |= tag == _NAME_END
        self._emit_arguments(self._object.begin_value(key, is_string=tag == _STRING_NAME_END))
        self._state = self._value
        return True

    def _value(self) -> bool:
        event = self._reader.read(self._value_ends)
        if event is None:
            return False
        text, tag = event
        self._emit_arguments(self._object.write(text))
        if tag:
            self._emit_arguments(self._object.end_value(_is_json))
            self._state = self._parameters
        return True

    def _end_cut_call(self) -> None:
        rest = self._take_pieces()
        if self._state == self._invoke_name and rest:
            self._begin_call(rest)
        elif self._state == self._key and rest:
            self._emit_arguments(self._object.cut_key(rest))
        elif self._state == self._value:
            self._emit_arguments(self._object.cut_value())
        elif self._state == self._json:
            self._emit_arguments(self._json_space.take())


class DeepSeekV4Parser(DeepSeekV32Parser):
    """The block has another name, and `｜DSML｜` is an added token."""

    block_begin = "<｜DSML｜tool_calls>"
    block_end = "</｜DSML｜tool_calls>"
    openers = (_BLANK_LINE + block_begin, block_begin, _BLANK_LINE + _INVOKE_BEGIN, _INVOKE_BEGIN)


def _is_json(text: str) -> bool:
    return json_type(text) is not None
