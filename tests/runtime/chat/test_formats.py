"""Which format a checkpoint has, whether it thinks, and where an output begins."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.runtime.chat.formats import CHAT_FORMATS, choose_format
from shoal.runtime.chat.messages import read_conversation
from tests.support.chat_messages import Message, assistant, call, system, tool, user


@pytest.mark.parametrize(
    ("template", "model_type", "expected"),
    [
        (None, "deepseek_v32", "deepseek_v32"),
        ("", "deepseek_v4", "deepseek_v4"),
        ("{{ '<｜DSML｜invoke' }}<｜Assistant｜>", "deepseek_v32", "deepseek_v32"),
        ("{{ '<｜DSML｜invoke' }}<｜Assistant｜>", "deepseek_v4", "deepseek_v4"),
        ("{% set ns.is_only_sys = true %}{{ '<｜Assistant｜>' if thinking }}", "deepseek_v32", "deepseek_v32_exp"),
        ("{% if not thinking %}{{ '<｜Assistant｜></think>' }}", "deepseek_v3", "deepseek_v31"),
        ("{{ content.split('</think>')[-1] }}{{ '<｜Assistant｜><think>\\n' }}", "deepseek_v3", "deepseek_r1"),
        ("{{ content.split('</think>')[-1] }}{{ '<｜Assistant｜><think>\n' }}", "deepseek_v3", "deepseek_r1"),
        ("{{ content.split('</think>')[-1] }}{{ '<｜Assistant｜>' }}", "deepseek_v3", "deepseek_r1_0528"),
        ("{{ '<｜Assistant｜>' }}", "deepseek_v3", "deepseek_v3"),
        ("{% set hist_msgs = messages %}<|im_middle|>{{ tools_ts_str }}", "kimi_k25", "kimi_k25"),
        ("{% set hist_msgs = messages %}<|im_middle|>", "kimi_k2", "kimi_k2_thinking"),
        ("<|im_middle|>\n  # Tools\n  {{ tools | tojson }}", "kimi_k2", "kimi_k2_0905"),
        ("<|im_middle|>{{ tools | tojson(separators=(',', ':')) }}", "kimi_k2", "kimi_k2"),
        ("[gMASK]<sop>Reasoning Effort: {% if enable_thinking %}{% if defer_loading %}", "glm5", "glm_52"),
        ("[gMASK]<sop>Reasoning Effort: {% if defer_loading %}", "glm5", "glm_53"),
        ("[gMASK]<sop>\n# Tools{{ '/nothink' if not enable_thinking }}", "glm4_moe", "glm_46"),
        ("[gMASK]<sop>{% if enable_thinking %}{% if defer_loading %}", "glm5", "glm_51"),
        ("[gMASK]<sop>{% if enable_thinking %}", "glm5", "glm_5"),
    ],
)
def test_the_template_tells_the_format(template: str | None, model_type: str, expected: str) -> None:
    assert choose_format(template, model_type) == expected


@pytest.mark.parametrize(
    ("template", "model_type", "found"),
    [
        (None, "deepseek_v3", "no chat template"),
        (None, None, "no chat template"),
        ("{{ '<｜DSML｜invoke' }}", "deepseek_v5", "an unknown chat template"),
        ("<|im_start|>", "deepseek_v3", "an unknown chat template"),
    ],
)
def test_an_unknown_template_names_the_setting(template: str | None, model_type: str | None, found: str) -> None:
    with pytest.raises(ValueError, match=f"{found}; set chat_format to one of deepseek_v3, .*, glm_53$"):
        choose_format(template, model_type)


QUESTION = [system("s"), user("<think>")]
CALLS = assistant(None, tool_calls=[call("f", "{}", "functions.f:0")])
RESULT = [*QUESTION, CALLS, tool("<think>", "functions.f:0")]


@pytest.mark.parametrize(
    ("format_name", "thinking", "messages", "expected"),
    [
        ("deepseek_v3", False, QUESTION, "content"),
        ("deepseek_v3", False, RESULT, "content"),
        ("deepseek_r1", True, QUESTION, "reasoning"),
        ("deepseek_r1", True, RESULT, "auto"),
        ("deepseek_r1_0528", True, QUESTION, "auto"),
        ("deepseek_r1_0528", True, [*QUESTION, assistant("Well", prefix=True)], "content"),
        ("deepseek_r1_0528", True, [*QUESTION, assistant("", prefix=True)], "auto"),
        ("deepseek_v31", True, QUESTION, "reasoning"),
        ("deepseek_v31", False, QUESTION, "content"),
        ("deepseek_v31", True, RESULT, "content"),  # the answer to a result follows it without a tag
        ("deepseek_v31", True, [*QUESTION, assistant("Let me", prefix=True)], "reasoning"),
        ("deepseek_v31", False, [*QUESTION, assistant("The", prefix=True)], "content"),
        ("deepseek_v32_exp", True, [system("s")], "reasoning"),
        ("deepseek_v32", True, RESULT, "reasoning"),
        ("deepseek_v32", False, RESULT, "content"),
        ("deepseek_v32", True, [*QUESTION, assistant("", prefix=True, reasoning="hm")], "reasoning"),
        ("deepseek_v4", True, RESULT, "reasoning"),
        ("deepseek_v4", True, [*QUESTION, assistant("The", prefix=True, reasoning="hm")], "content"),
        ("kimi_k2_0905", False, QUESTION, "content"),
        ("kimi_k2", False, RESULT, "content"),
        ("kimi_k2_thinking", True, QUESTION, "auto"),
        ("kimi_k2_thinking", True, [*QUESTION, assistant("The", prefix=True)], "content"),
        ("kimi_k25", True, RESULT, "reasoning"),
        ("kimi_k25", False, QUESTION, "content"),
        ("glm_46", True, QUESTION, "auto"),
        ("glm_46", False, QUESTION, "content"),
        ("glm_5", True, RESULT, "reasoning"),
        ("glm_51", False, QUESTION, "content"),
        ("glm_52", False, QUESTION, "content"),
        ("glm_53", True, QUESTION, "reasoning"),
    ],
)
def test_an_output_begins_where_the_prompt_ends(
    format_name: str, thinking: bool, messages: list[Message], expected: str
) -> None:
    chat_format = CHAT_FORMATS[format_name]
    parts = chat_format.encode(read_conversation(messages, thinking=thinking))
    assert chat_format.start_state(parts) == expected


@pytest.mark.parametrize(
    ("format_name", "request_fields", "expected"),
    [
        ("deepseek_v31", {}, False),
        ("deepseek_v31", {"thinking": True}, True),
        ("deepseek_v31", {"enable_thinking": True}, True),
        ("deepseek_v31", {"enable_thinking": True, "reasoning_effort": "none"}, True),
        ("deepseek_v31", {"reasoning_effort": "high"}, False),
        ("glm_5", {}, True),
        ("glm_5", {"thinking": False}, False),
        ("glm_5", {"thinking": False, "enable_thinking": False}, False),
        ("glm_5", {"reasoning_effort": "none"}, False),
        ("glm_53", {"reasoning_effort": "none"}, True),
        ("deepseek_r1", {}, True),
        ("deepseek_v3", {}, False),
        ("deepseek_v3", {"thinking": False}, False),
    ],
)
def test_thinking(format_name: str, request_fields: dict[str, Any], expected: bool) -> None:
    assert CHAT_FORMATS[format_name].choose_thinking(**request_fields) is expected


@pytest.mark.parametrize(
    ("format_name", "request_fields", "message"),
    [
        ("glm_5", {"thinking": True, "enable_thinking": False}, "contradict"),
        ("kimi_k2", {"thinking": True}, "kimi_k2 do not think"),
        ("glm_53", {"enable_thinking": False}, "glm_53 always think"),
    ],
)
def test_thinking_that_cannot_be_had(format_name: str, request_fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CHAT_FORMATS[format_name].choose_thinking(**request_fields)
