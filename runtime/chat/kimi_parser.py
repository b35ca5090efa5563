"""Outputs of Kimi-K2."""

from __future__ import annotations

import re

from .grammar_parser import ParserOptions
from .json_arguments import JsonStringScanner
from .section_parser import SectionParser

_CALLS_BEGIN = "<|tool_calls_section_begin|>"
_CALLS_END = "<|tool_calls_section_end|>"
_CALL_BEGIN = "<|tool_call_begin|>"
_CALL_END = "<|tool_call_end|>"
_ARGUMENTS_BEGIN = "<|tool_call_argument_begin|>"
_NUMBER = re.compile(r":[0-9]+\Z")


class KimiParser(SectionParser):
    """The header is the call's id, `functions.{name}:{n}`. White space around id and arguments is dropped."""

    tokens = (_CALLS_BEGIN, _CALLS_END, _CALL_BEGIN, _CALL_END, _ARGUMENTS_BEGIN)
    openers = (_CALLS_BEGIN,)
    calls_end = _CALLS_END
    call_begin = _CALL_BEGIN
    separator = _ARGUMENTS_BEGIN
    call_end = _CALL_END

    def __init__(self, options: ParserOptions) -> None:
        super().__init__(options)
        self._strings = JsonStringScanner()

    def _end_header(self, header: str, tag: str) -> None:
        self._begin_call_of(header.strip())
        if tag == _ARGUMENTS_BEGIN:
            self._begin_arguments()
        else:
            self._end_without_arguments()

    def _end_cut_header(self, header: str) -> None:
        self._begin_call_of(header)

    def _begin_call_of(self, call_id: str) -> None:
        name = _NUMBER.sub("", call_id.removeprefix("functions."))
        self._begin_call(name, call_id or None)

    def _begin_arguments(self) -> None:
        super()._begin_arguments()
        self._strings = JsonStringScanner()

    def _arguments(self) -> bool:
        event = self._reader.read(self._argument_ends)
        if event is None:
            return False
        text, tag = event
        if not self._reader.is_token(_CALL_END):
            self._strings.scan(text)
            if self._strings.is_open:  # a tag that is text in a JSON string is data
                self._strings.scan(tag)
                text, tag = text + tag, ""
        self._write_arguments(text if self._has_arguments else text.lstrip())
        if tag:
            self._end_arguments(tag)
        return True

    def _end_arguments(self, tag: str) -> None:
        self._argument_space.take()
        super()._end_arguments(tag)
