"""The chat formats by name, and the one that a checkpoint's chat template stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..tokenization.tokenizer import THINK_END, THINK_START, Part, Special
from . import glm, kimi
from .conversation import Conversation
from .deepseek import (
    encode_deepseek_r1,
    encode_deepseek_r1_0528,
    encode_deepseek_v3,
    encode_deepseek_v31,
    encode_deepseek_v32_exp,
)
from .dsml import encode_deepseek_v4, encode_deepseek_v32
from .names import ChatFormatName
from .output import StartState

Grammar = Literal["deepseek_v3", "deepseek_v31", "deepseek_v32", "deepseek_v4", "kimi", "glm"]
Thinking = Literal["never", "off", "on", "always"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatFormat:
    """The way in which a family of models reads conversations and writes answers."""

    name: ChatFormatName
    encode: Callable[[Conversation], list[Part]]
    """The prompt up to where the answer begins; ValueError for what the format cannot express."""
    grammar: Grammar
    """How outputs are written."""
    thinking: Thinking
    """Whether the model thinks. "off" and "on" are what it does by default, where a request can choose."""
    writes_reasoning_start: bool = False
    """Whether outputs may begin with the tag that opens the reasoning; otherwise only prompts have it."""
    reasoning_start: str = THINK_START
    reasoning_end: str = THINK_END
    end_tokens: tuple[str, ...] = ()
    """Added tokens that end an answer, beside the tokenizer's end of sequence."""

    def start_state(self, parts: Sequence[Part]) -> StartState:
        """Where the output of this prompt begins, from what the prompt ends with."""
        last_tag = next((part for part in reversed(parts) if isinstance(part, Special)), None)
        if last_tag == Special(self.reasoning_start):
            return "reasoning"
        answer_has_begun = last_tag == Special(self.reasoning_end) or parts[-1:] != [last_tag]
        return "auto" if self.writes_reasoning_start and not answer_has_begun else "content"

    def choose_thinking(
        self,
        *,
        thinking: bool | None = None,
        enable_thinking: bool | None = None,
        reasoning_effort: str | None = None,
    ) -> bool:
        """Whether to think, from what a request says: `thinking` and `enable_thinking` mean the same.

        An effort of "none" turns thinking off where that is possible and neither is given.
        ValueError: they contradict each other, or the model cannot do what they ask.
        """
        if None not in (thinking, enable_thinking) and thinking != enable_thinking:
            raise ValueError("thinking and enable_thinking mean the same and contradict each other; give one")
        wanted = enable_thinking if thinking is None else thinking
        if self.thinking == "never" and wanted:
            raise ValueError(f"models with the chat format {self.name} do not think; leave thinking out")
        if self.thinking == "always" and wanted is False:
            raise ValueError(f"models with the chat format {self.name} always think; leave thinking out")
        if self.thinking in ("never", "always"):
            return self.thinking == "always"
        if wanted is not None:
            return wanted
        return self.thinking == "on" and reasoning_effort != "none"


_KIMI_END = (kimi.IM_END,)
_GLM_END = (glm.END_OF_TEXT, glm.USER, glm.OBSERVATION)

_FORMATS = (
    ChatFormat(name="deepseek_v3", encode=encode_deepseek_v3, grammar="deepseek_v3", thinking="never"),
    ChatFormat(
        name="deepseek_r1",
        encode=encode_deepseek_r1,
        grammar="deepseek_v3",
        thinking="always",
        writes_reasoning_start=True,
    ),
    ChatFormat(
        name="deepseek_r1_0528",
        encode=encode_deepseek_r1_0528,
        grammar="deepseek_v3",
        thinking="always",
        writes_reasoning_start=True,
    ),
    ChatFormat(name="deepseek_v31", encode=encode_deepseek_v31, grammar="deepseek_v31", thinking="off"),
    ChatFormat(name="deepseek_v32_exp", encode=encode_deepseek_v32_exp, grammar="deepseek_v31", thinking="off"),
    ChatFormat(name="deepseek_v32", encode=encode_deepseek_v32, grammar="deepseek_v32", thinking="off"),
    ChatFormat(name="deepseek_v4", encode=encode_deepseek_v4, grammar="deepseek_v4", thinking="off"),
    ChatFormat(
        name="kimi_k2_0905",
        encode=kimi.encode_kimi_k2_0905,
        grammar="kimi",
        thinking="never",
        end_tokens=_KIMI_END,
    ),
    ChatFormat(name="kimi_k2", encode=kimi.encode_kimi_k2, grammar="kimi", thinking="never", end_tokens=_KIMI_END),
    ChatFormat(
        name="kimi_k2_thinking",
        encode=kimi.encode_kimi_k2_thinking,
        grammar="kimi",
        thinking="always",
        writes_reasoning_start=True,
        end_tokens=_KIMI_END,
    ),
    ChatFormat(name="kimi_k25", encode=kimi.encode_kimi_k25, grammar="kimi", thinking="on", end_tokens=_KIMI_END),
    ChatFormat(
        name="glm_46",
        encode=glm.encode_glm_46,
        grammar="glm",
        thinking="on",
        writes_reasoning_start=True,
        end_tokens=_GLM_END,
    ),
    ChatFormat(name="glm_5", encode=glm.encode_glm_5, grammar="glm", thinking="on", end_tokens=_GLM_END),
    ChatFormat(name="glm_51", encode=glm.encode_glm_51, grammar="glm", thinking="on", end_tokens=_GLM_END),
    ChatFormat(name="glm_52", encode=glm.encode_glm_52, grammar="glm", thinking="on", end_tokens=_GLM_END),
    ChatFormat(name="glm_53", encode=glm.encode_glm_53, grammar="glm", thinking="always", end_tokens=_GLM_END),
)
CHAT_FORMATS: dict[str, ChatFormat] = {chat_format.name: chat_format for chat_format in _FORMATS}
"""What the setting `chat_format` can name."""

_DSML_FORMATS: dict[str, ChatFormatName] = {"deepseek_v32": "deepseek_v32", "deepseek_v4": "deepseek_v4"}


def choose_format(chat_template: str | None, model_type: str | None) -> ChatFormatName:
    """The name of the chat format that a checkpoint's template stands for; no code of the template is run.

    V3.2 and V4 come without a template, so that `model_type` of config.json tells them.
    """
    name = _format_of_template(chat_template or "", model_type)
    if name is None:
        found = "an unknown chat template" if chat_template else "no chat template"
        raise ValueError(
            f"the checkpoint (model_type {model_type}) has {found}; set chat_format to one of {', '.join(CHAT_FORMATS)}"
        )
    return name


def _format_of_template(template: str, model_type: str | None) -> ChatFormatName | None:
    if not template or "｜DSML｜" in template:
        return _DSML_FORMATS.get(model_type or "")
    if "<｜Assistant｜>" in template:
        return _deepseek_format(template)
    if kimi.IM_MIDDLE in template:
        return _kimi_format(template)
    if glm.GMASK + glm.SOP in template:
        return _glm_format(template)
    return None


def _deepseek_format(template: str) -> ChatFormatName:
    if "is_only_sys" in template:
        return "deepseek_v32_exp"
    if re.search(r"\bthinking\b", template):
        return "deepseek_v31"
    if re.search(r"<｜Assistant｜><think>(\n|\\n)", template):
        return "deepseek_r1"
    return "deepseek_r1_0528" if THINK_END in template else "deepseek_v3"


def _kimi_format(template: str) -> ChatFormatName:
    if "tools_ts_str" in template:
        return "kimi_k25"
    if "hist_msgs" in template:
        return "kimi_k2_thinking"
    return "kimi_k2_0905" if re.search(r"^[ \t]+# Tools", template, re.MULTILINE) else "kimi_k2"


def _glm_format(template: str) -> ChatFormatName:
    if "Reasoning Effort" in template:
        return "glm_52" if "enable_thinking" in template else "glm_53"
    if glm.NO_THINK in template:
        return "glm_46"
    return "glm_51" if "defer_loading" in template else "glm_5"
