"""What a model wrote, apart: reasoning, content and tool calls, whole or as deltas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

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
