"""Names of the chat formats, for settings that must not load tokenizers."""

from __future__ import annotations

from typing import Literal

ChatFormatName = Literal[
    "deepseek_v3",
    "deepseek_r1",
    "deepseek_r1_0528",
    "deepseek_v31",
    "deepseek_v32_exp",
    "deepseek_v32",
    "deepseek_v4",
    "kimi_k2_0905",
    "kimi_k2",
    "kimi_k2_thinking",
    "kimi_k25",
    "glm_46",
    "glm_5",
    "glm_51",
    "glm_52",
    "glm_53",
]
