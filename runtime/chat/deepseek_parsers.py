"""Outputs of DeepSeek-V3, R1 and V3.1, whose tags are added tokens."""

from __future__ import annotations

from ..tokenization.tokenizer import TOOL_CALL_BEGIN, TOOL_CALL_END, TOOL_CALLS_BEGIN, TOOL_CALLS_END, TOOL_SEP
from .grammar_parser import ParserOptions
from .section_parser import SectionParser

_TYPE = "function"
_FENCE = "```json\n"


class DeepSeekV31Parser(SectionParser):
    """DeepSeek-V3.1, V3.1-Terminus and V3.2-Exp: the header is the name, the arguments are bare."""

    tokens = (TOOL_CALLS_BEGIN, TOOL_CALLS_END, TOOL_CALL_BEGIN, TOOL_CALL_END, TOOL_SEP)
    openers = (TOOL_CALLS_BEGIN,)
    calls_end = TOOL_CALLS_END
    call_begin = TOOL_CALL_BEGIN
    separator = TOOL_SEP
    call_end = TOOL_CALL_END

    def _end_header(self, header: str, tag: str) -> None:
        self._begin_call(header.strip())
        if tag == TOOL_SEP:
            self._begin_arguments()
        else:
            self._end_without_arguments()

    def _end_cut_header(self, header: str) -> None:
        self._begin_call(header)


class DeepSeekV3Parser(DeepSeekV31Parser):
    """DeepSeek-V3 and R1: the header is a type, then come the name, a line break and the arguments in a fence.

    Only a fence directly before the call's end closes it. Arguments without a fence are accepted.
    """

    def __init__(self, options: ParserOptions) -> None:
        super().__init__(options)
        self._name_ends = self._reader.tag_set("\n", TOOL_CALL_END)
        self._fence_begin = self._reader.tag_set(_FENCE)
        self._bare_ends = self._argument_ends
        self._fenced_ends = self._reader.tag_set(f"\n```{TOOL_CALL_END}", f"```{TOOL_CALL_END}", TOOL_CALL_END)

    def _end_header(self, header: str, tag: str) -> None:
        call_type = header.strip()
        if call_type != _TYPE:
            self._emit_stray(call_type)
        self.is_malformed |= tag == TOOL_CALL_END
        self._state = self._name if tag == TOOL_SEP else self._between_calls

    def _name(self) -> bool:
        read = self._read_up_to(self._name_ends)
        if read is None:
            return False
        name, tag = read
        self._begin_call(name.strip())
        if tag == TOOL_CALL_END:
            self._end_without_arguments()
        else:
            self._state = self._fence
        return True

    def _fence(self) -> bool:
        tag = None if self._is_finished else self._reader.match(self._fence_begin)
        if tag is None:
            return False
        self.is_malformed |= not tag
        self._argument_ends = self._fenced_ends if tag else self._bare_ends
        self._begin_arguments()
        return True

    def _end_arguments(self, tag: str) -> None:
        self.is_malformed |= tag == TOOL_CALL_END  # without its fence
        super()._end_arguments(tag)

    def _end_cut_header(self, header: str) -> None:
        if not _TYPE.startswith(header):
            self._emit_stray(header)

    def _end_cut_call(self) -> None:
        if self._state == self._name and (name := self._take_pieces().strip()):
            self._begin_call(name)
        super()._end_cut_call()
