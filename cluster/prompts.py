"""Text and conversations to token ids, for one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.runtime.models.families import FAMILIES
from shoal.runtime.tokenization.chat import CHAT_FORMATS, ChatPrompt, render_chat
from shoal.runtime.tokenization.tokenizer import Tokenizer, read_json


@dataclass(frozen=True, slots=True)
class ModelPrompts:
    """A model's tokenizer and chat format; the methods raise ValueError for what they cannot encode."""

    tokenizer: Tokenizer
    model_type: str

    @classmethod
    def from_pretrained(cls, model: str | Path) -> ModelPrompts | None:
        """Read a model directory; None if it has no tokenizer.json."""
        tokenizer = Tokenizer.from_pretrained(model)
        if tokenizer is None:
            return None
        config = read_json(Path(model) / "config.json") or {}
        return cls(tokenizer, str(config.get("model_type")))

    @property
    def chat_format(self) -> str | None:
        """Name of the model's chat format; None if chat is not supported for it."""
        return FAMILIES[self.model_type].chat_format if self.model_type in FAMILIES else None

    def encode_text(self, text: str) -> list[int]:
        """The token ids of a completion prompt: plain text with the tokens that the tokenizer adds to a prompt."""
        return self.tokenizer.encode_prompt(text)

    def encode_messages(self, messages: Sequence[Mapping[str, Any]], thinking: bool) -> ChatPrompt:
        """The prompt of a conversation, up to and including the header of the answer."""
        if self.chat_format is None:
            raise ValueError(f"chat is not supported for {self.model_type}; give a prompt or token ids")
        chat_format = CHAT_FORMATS[self.chat_format]
        return render_chat(messages, chat_format=chat_format, thinking=thinking, tokenizer=self.tokenizer)
