"""What all output grammars share: reasoning, content, and the deltas that come out.

    beginning -> reasoning -> content -> calls (a grammar's own states) -> after calls

A state is a method that reads as far as it can: it returns True after a step, False to wait for input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..tokenization.tokenizer import THINK_END, THINK_START, Part, Tokenizer
from .output import ContentDelta, OutputDelta, ReasoningDelta, StartState, ToolCallDelta
from .tag_reader import TagReader, TagSet
from .white_space import ContentHolder, SpaceHolder, VerbatimContent


@dataclass(frozen=True, kw_only=True, slots=True)
class ParserOptions:
    """What `make_parser` is given."""

    start: StartState
    tools: Sequence[Mapping[str, Any]]
    parse_tools: bool
    tokenizer: Tokenizer | None


class GrammarParser(ABC):
    """An `OutputParser`; subclasses add the states from an opener of calls on.

    All text comes out in a delta, except for tags, white space between them, and text after the calls. Text where only
    tags can stand becomes content.
    A tag that the end of the output cuts off is text where text can stand, and dropped between tags and in names.
    """

    tokens: ClassVar[tuple[str, ...]]
    """Added tokens that the grammar's tags are made of; one that the tokenizer lacks is text."""
    openers: ClassVar[tuple[str, ...]]
    """Tags that begin calls, and end the reasoning and the content before them."""

    def __init__(self, options: ParserOptions) -> None:
        openers = self.openers if options.parse_tools else ()
        self._reader = TagReader(_known_tokens((THINK_START, THINK_END, *self.tokens), options.tokenizer))
        self._openers = self._reader.tag_set(*openers)
        self._think_start = self._reader.tag_set(THINK_START)
        self._reasoning_ends = self._reader.tag_set(THINK_END, *openers)
        self._options = options
        self._state: Callable[[], bool] = self._content if options.start == "content" else self._beginning
        self._content_holder = self._make_content_holder()
        self._has_content = False
        self._stray_space = SpaceHolder()
        self._beginning_space: list[str] = []
        self._pieces: list[str] = []
        self._num_calls = 0
        self._deltas: list[OutputDelta] = []
        self._is_finished = False
        self.is_malformed = False

    def feed(self, parts: Sequence[Part]) -> list[OutputDelta]:
        self._reader.push(parts)
        self._run()
        return self._take_deltas()

    def finish(self) -> list[OutputDelta]:
        self._is_finished = True
        self._reader.finish()
        self._run()
        self._end_cut_call()
        self._emit_content(self._content_holder.finish())
        if self._state == self._content and not self._has_content and not self._num_calls:
            self._deltas.append(ContentDelta(""))  # the content is empty, not missing
        return self._take_deltas()

    @abstractmethod
    def _begin_calls(self, opener: str) -> None:
        """Go to the state that follows an opener."""

    @abstractmethod
    def _end_cut_call(self) -> None:
        """Hand on what the end of the output cut off and no delta has yet."""

    def _make_content_holder(self) -> ContentHolder:
        return VerbatimContent()

    # States.

    def _beginning(self) -> bool:
        """White space at the beginning of the output, where it may open its reasoning."""
        self._beginning_space.append(self._reader.read_space())
        tag = self._reader.match(self._think_start)
        if tag is None:
            return False
        space = "" if tag else "".join(self._beginning_space)
        if self._options.start == "auto" and not tag:
            self._state = self._content
            self._emit_content(self._content_holder.write(space))
        else:
            self._state = self._reasoning
            self._emit_reasoning(space)
        return True

    def _reasoning(self) -> bool:
        event = self._reader.read(self._reasoning_ends)
        if event is None:
            return False
        text, tag = event
        self._emit_reasoning(text)
        if tag == THINK_END:
            self._state = self._content
        elif tag:
            self.is_malformed = True  # the reasoning has no end tag
            self._begin_calls(tag)
        return True

    def _content(self) -> bool:
        event = self._reader.read(self._openers)
        if event is None:
            return False
        text, tag = event
        self._emit_content(self._content_holder.write(text))
        if tag:
            self._begin_calls(tag)
        return True

    def _after_calls(self) -> bool:
        """Text that is dropped; further calls are not."""
        event = self._reader.read(self._openers)
        if event is None:
            return False
        if event[1]:
            self._begin_calls(event[1])
        return True

    # Reading in a grammar's own states.

    def _read_tag(self, tags: TagSet) -> str | None:
        """The next tag where only tags and white space can stand; None to wait."""
        while not self._is_finished and (event := self._reader.read(tags)) is not None:
            text, tag = event
            self._emit_stray(self._stray_space.write(text))
            if tag:
                self._stray_space.take()
                return tag
        return None

    def _read_up_to(self, tags: TagSet) -> tuple[str, str] | None:
        """The whole text before the next tag, for what counts only when complete, and the tag; None to wait."""
        while not self._is_finished and (event := self._reader.read(tags)) is not None:
            text, tag = event
            self._pieces.append(text)
            if tag:
                return self._take_pieces(), tag
        return None

    def _take_pieces(self) -> str:
        """What `_read_up_to` has read before the end of the output."""
        text = "".join(self._pieces)
        self._pieces.clear()
        return text

    # Deltas.

    def _emit_reasoning(self, text: str) -> None:
        if text:
            self._deltas.append(ReasoningDelta(text))

    def _emit_content(self, text: str) -> None:
        if text:
            self._has_content = True
            self._deltas.append(ContentDelta(text))

    def _emit_stray(self, text: str) -> None:
        """Make content of text that stands where the grammar has none."""
        if text:
            self.is_malformed = True
            self._emit_content(self._content_holder.write(text))

    def _begin_call(self, name: str, call_id: str | None = None) -> None:
        self.is_malformed |= not name
        self._emit_content(self._content_holder.begin_call())
        self._deltas.append(ToolCallDelta(self._num_calls, id=call_id, name=name))
        self._num_calls += 1

    def _emit_arguments(self, text: str) -> None:
        if text:
            self._deltas.append(ToolCallDelta(self._num_calls - 1, arguments=text))

    def _run(self) -> None:
        while self._state():
            pass

    def _take_deltas(self) -> list[OutputDelta]:
        deltas = self._deltas
        self._deltas = []
        return deltas


def _known_tokens(tokens: Sequence[str], tokenizer: Tokenizer | None) -> list[str]:
    """The tokens that the tokenizer has as added tokens."""
    return [] if tokenizer is None else [token for token in tokens if tokenizer.special_id(token) is not None]
