"""From a conversation to token ids, and from an output's tokens to its message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ..tokenization.tokenizer import Part, Special, Tokenizer
from .call_grammar import CallRules
from .conversation import Conversation
from .formats import ChatFormat
from .output import OutputDelta, ParsedOutput, StartState, assemble
from .parsers import make_parser, tag_tokens
from .token_parts import TokenParts


class OutputFormat(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How the output of a chat prompt is read."""

    grammar: str
    start: StartState
    tools: tuple[dict[str, Any], ...] = ()
    """The tools that may be called; () reads nothing as a call."""
    reasoning_end_token_id: int | None = None
    """Ends the reasoning that the prompt leaves open; None: it leaves none open."""


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A prompt as token ids."""

    token_ids: list[int]
    output_format: OutputFormat | None = None
    """None: the output is text."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a turn of this format, beside the tokenizer's end of sequence."""
    calls: CallRules | None = None
    """The calls that the answer must have; None: as the model likes."""
    spelled_token: str | None = None
    """An added token that a text prompt spells: its characters are encoded as text."""

    @property
    def reasoning_end_token_id(self) -> int | None:
        """Ends the reasoning that the prompt leaves open; None: it leaves none open."""
        return None if self.output_format is None else self.output_format.reasoning_end_token_id


def render_prompt(conversation: Conversation, *, chat_format: ChatFormat, tokenizer: Tokenizer) -> ChatPrompt:
    """Render a conversation up to where the answer begins. Calls in the output are read if it has tools.

    ValueError for what the format cannot express, by the index of the message, and for tokens the tokenizer lacks.
    """
    parts = chat_format.encode(conversation)
    _check_tokens(parts, tokenizer)
    start = chat_format.start_state(parts)
    output_format = OutputFormat(
        grammar=chat_format.grammar,
        start=start,
        tools=tuple(map(dict, conversation.tools)),
        reasoning_end_token_id=tokenizer.special_id(chat_format.reasoning_end) if start == "reasoning" else None,
    )
    ends = map(tokenizer.special_id, chat_format.end_tokens)
    stop_token_ids = tuple(i for i in ends if i is not None and i not in tokenizer.eos_token_ids)
    return ChatPrompt(tokenizer.encode_rendered(parts), output_format, stop_token_ids)


class OutputReader:
    """Reads one output while it is generated; any cut of it gives deltas with the same sum."""

    def __init__(self, output_format: OutputFormat, *, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        """`skip_special_tokens` is that of the request: whether the engine's text leaves special tokens out."""
        self._parser = make_parser(
            output_format.grammar,
            start=output_format.start,
            tools=output_format.tools,
            parse_tools=bool(output_format.tools),
            tokenizer=tokenizer,
        )
        left_out: frozenset[int] = frozenset()
        if skip_special_tokens:
            left_out = tokenizer.skipped_beside(tag_tokens(output_format.grammar))
        self._parts = TokenParts(tokenizer, skip_special_tokens=skip_special_tokens, end_token_ids=left_out)

    @property
    def is_malformed(self) -> bool:
        """See `OutputParser.is_malformed`."""
        return self._parser.is_malformed

    def add(self, token_ids: Sequence[int], num_chars: int) -> list[OutputDelta]:
        """Take the next tokens. num_chars: length of the engine's text of the output so far."""
        return self._parser.feed(self._parts.append(token_ids, num_chars))

    def finish(self, num_chars: int) -> list[OutputDelta]:
        """End the output, whose text has `num_chars` characters: a stop string may have cut it."""
        return [*self._parser.feed(self._parts.finish(num_chars)), *self._parser.finish()]


def parse_output(
    text: str,
    token_ids: Sequence[int],
    output_format: OutputFormat,
    *,
    tokenizer: Tokenizer,
    skip_special_tokens: bool = True,
) -> ParsedOutput:
    """Read a whole output. `text` is the engine's."""
    reader = OutputReader(output_format, tokenizer=tokenizer, skip_special_tokens=skip_special_tokens)
    deltas = [*reader.add(token_ids, len(text)), *reader.finish(len(text))]
    return assemble(deltas, is_malformed=reader.is_malformed)


def _check_tokens(parts: Sequence[Part], tokenizer: Tokenizer) -> None:
    tags = {part.text for part in parts if isinstance(part, Special)}
    lacking = sorted(tag for tag in tags if tokenizer.special_id(tag) is None)
    if lacking:
        raise ValueError(
            f"this tokenizer has no token {', '.join(lacking)}, which this conversation needs; "
            "send a prompt or token ids instead"
        )
