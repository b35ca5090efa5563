"""Text and conversations to token ids, for one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.runtime.tokenization.chat import encode_chat
from shoal.runtime.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ModelPrompts:
    """A model's tokenizer and prompt format; both methods raise ValueError for what they cannot encode."""

    tokenizer: Tokenizer

    def encode_text(self, text: str) -> list[int]:
        """The token ids of a completion prompt: plain text with the tokens that the tokenizer adds to a prompt."""
        return self.tokenizer.encode_prompt(text)

    def encode_messages(self, messages: Sequence[Mapping[str, Any]], thinking: bool) -> list[int]:
        """The token ids of a conversation, up to and including the header of the answer."""
        return self.tokenizer.encode_rendered(encode_chat(messages, thinking=thinking, tokenizer=self.tokenizer))
