"""The grammar that DeepSeek's fenced and bare calls and Kimi's have in common.

{content}<calls begin><call begin>{header}<separator>{arguments}<call end><call begin>..<call end><calls end>
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from .grammar_parser import GrammarParser, ParserOptions
from .white_space import SpaceHolder


class SectionParser(GrammarParser):
    """Reads one section of calls whose arguments are JSON text. Subclasses read headers and name the tags."""

    calls_end: ClassVar[str]
    call_begin: ClassVar[str]
    separator: ClassVar[str]
    call_end: ClassVar[str]

    def __init__(self, options: ParserOptions) -> None:
        super().__init__(options)
        self._call_tags = self._reader.tag_set(self.call_begin, self.calls_end)
        self._header_ends = self._reader.tag_set(self.separator, self.call_end)
        self._argument_ends = self._reader.tag_set(self.call_end)
        self._argument_space = SpaceHolder()
        self._has_arguments = False

    @abstractmethod
    def _end_header(self, header: str, tag: str) -> None:
        """Begin the call, `tag` being the separator, or the call's end where the separator is missing."""

    @abstractmethod
    def _end_cut_header(self, header: str) -> None:
        """Hand on a header that ends with the output."""

    def _begin_calls(self, opener: str) -> None:
        self._state = self._between_calls

    def _between_calls(self) -> bool:
        tag = self._read_tag(self._call_tags)
        if tag is None:
            return False
        self._state = self._header if tag == self.call_begin else self._after_calls
        return True

    def _header(self) -> bool:
        read = self._read_up_to(self._header_ends)
        if read is None:
            return False
        self._end_header(*read)
        return True

    def _begin_arguments(self) -> None:
        self._has_arguments = False
        self._state = self._arguments

    def _arguments(self) -> bool:
        event = self._reader.read(self._argument_ends)
        if event is None:
            return False
        text, tag = event
        self._write_arguments(text)
        if tag:
            self._end_arguments(tag)
        return True

    def _write_arguments(self, text: str) -> None:
        released = self._argument_space.write(text)
        if released:
            self._has_arguments = True
            self._emit_arguments(released)

    def _end_arguments(self, tag: str) -> None:
        """End the call, whose arguments keep the white space around them; none at all mean an empty object."""
        space = self._argument_space.take()
        self._emit_arguments(space if self._has_arguments else "{}")
        self._state = self._between_calls

    def _end_without_arguments(self) -> None:
        """End a call that has no separator."""
        self.is_malformed = True
        self._emit_arguments("{}")
        self._state = self._between_calls

    def _end_cut_call(self) -> None:
        if self._state == self._arguments:
            self._emit_arguments(self._argument_space.take())
        elif self._state == self._header and (header := self._take_pieces().strip()):
            self._end_cut_header(header)
