"""Outputs read as reasoning, content and tool calls: as deltas, or whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ..tokenization.tokenizer import Part

StartState = Literal["reasoning", "content", "auto"]
"""Where an output begins: inside reasoning, in its content, or with an opening tag that the model may write itself."""


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """New characters of a call. The first delta of a call has its name, and its id where the model writes one."""

    index: int
    """Number of the call in this output, from 0."""
    id: str | None = None
    name: str | None = None
    arguments: str = ""


OutputDelta = ReasoningDelta | ContentDelta | ToolCallDelta


class OutputParser(Protocol):
    """Reads one output of one grammar. Any cut of the parts gives deltas with the same sum. Never raises."""

    @property
    def is_malformed(self) -> bool:
        """Whether some of the output was not what the grammar promises; it is in the deltas all the same."""
        ...

    def feed(self, parts: Sequence[Part]) -> list[OutputDelta]:
        """Take the next parts of the output: text, and added tokens as `Special`."""
        ...

    def finish(self) -> list[OutputDelta]:
        """End the output; returns what was held back."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedToolCall:
    """A whole call."""

    id: str | None
    name: str
    arguments: str
    """JSON text if the model wrote any; text that is no JSON is handed on as it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedOutput:
    """A whole output. None: no reasoning; no content, because the reasoning did not end or there are only calls."""

    reasoning: str | None
    content: str | None
    tool_calls: list[ParsedToolCall]
    is_malformed: bool = False
    """See `OutputParser.is_malformed`."""


def assemble(deltas: Iterable[OutputDelta], *, is_malformed: bool = False) -> ParsedOutput:
    """The whole of all deltas of one output, `finish` included."""
    reasoning: list[str] = []
    content: list[str] = []
    calls: list[tuple[str | None, str, list[str]]] = []
    for delta in deltas:
        if isinstance(delta, ReasoningDelta):
            reasoning.append(delta.text)
        elif isinstance(delta, ContentDelta):
            content.append(delta.text)
        else:
            if delta.index == len(calls):
                calls.append((delta.id, delta.name or "", []))
            calls[delta.index][2].append(delta.arguments)
    return ParsedOutput(
        reasoning="".join(reasoning) if reasoning else None,
        content="".join(content) if content else None,
        tool_calls=[ParsedToolCall(id=i, name=name, arguments="".join(pieces)) for i, name, pieces in calls],
        is_malformed=is_malformed,
    )


def finish_reason(ended_by: str, *, has_calls: bool) -> str:
    """OpenAI's `finish_reason` for an output that ended by an end token or stop string ("stop"), "length", ..."""
    return "tool_calls" if has_calls and ended_by == "stop" else ended_by
