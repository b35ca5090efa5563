"""The whole of deltas."""

from __future__ import annotations

from shoal.runtime.chat.output import (
    ContentDelta,
    OutputDelta,
    ParsedOutput,
    ParsedToolCall,
    ReasoningDelta,
    ToolCallDelta,
    assemble,
    finish_reason,
)


def test_assemble() -> None:
    deltas: list[OutputDelta] = [ReasoningDelta("a"), ReasoningDelta("b"), ContentDelta("c")]
    deltas += [ToolCallDelta(0, id="7", name="f"), ToolCallDelta(0, arguments="{"), ToolCallDelta(0, arguments="}")]
    deltas += [ToolCallDelta(1, name="g"), ContentDelta("d")]
    assert assemble(deltas) == ParsedOutput(
        reasoning="ab",
        content="cd",
        tool_calls=[ParsedToolCall(id="7", name="f", arguments="{}"), ParsedToolCall(id=None, name="g", arguments="")],
    )
    assert assemble([]) == ParsedOutput(reasoning=None, content=None, tool_calls=[])


def test_finish_reason() -> None:
    assert finish_reason("stop", has_calls=True) == "tool_calls"
    assert finish_reason("length", has_calls=True) == "length"
    assert finish_reason("stop", has_calls=False) == "stop"
