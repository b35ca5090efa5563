"""Text and conversations to token ids, for one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shoal.runtime.chat.formats import CHAT_FORMATS, ChatFormat, choose_format
from shoal.runtime.chat.messages import read_conversation
from shoal.runtime.chat.names import ChatFormatName
from shoal.runtime.chat.prompt import ChatPrompt, render_prompt
from shoal.runtime.request_limits import RequestLimits
from shoal.runtime.structured.structured_outputs import StructuredOutputs
from shoal.runtime.tokenization.chat_template import read_chat_template
from shoal.runtime.tokenization.tokenizer import Tokenizer, read_json

from .engine_args import EngineArgs, read_model_config
from .openai.chat_options import ChatOptions
from .openai.requests import RequestDefaults


@dataclass(frozen=True, slots=True)
class ModelPrompts:
    """A model's tokenizer and chat format; the methods raise ValueError for what they cannot encode."""

    tokenizer: Tokenizer
    chat_format: ChatFormat | None
    no_chat_format: str = ""
    """Why there is no chat format."""

    @classmethod
    def from_pretrained(cls, model: str | Path, chat_format: ChatFormatName | None = None) -> ModelPrompts | None:
        """Read a model directory; None if it has no tokenizer.json.

        `chat_format`: a name of `CHAT_FORMATS`; None chooses by the directory's chat template.
        """
        tokenizer = Tokenizer.from_pretrained(model)
        if tokenizer is None:
            return None
        if chat_format is None:
            config = read_json(Path(model) / "config.json") or {}
            template = read_chat_template(model)
            try:
                chat_format = choose_format(template, config.get("model_type"))
            except ValueError as error:
                return cls(tokenizer, None, str(error))
        return cls(tokenizer, CHAT_FORMATS[chat_format])

    def encode_text(self, text: str) -> ChatPrompt:
        """A completion prompt: plain text with the tokens that the tokenizer adds to a prompt."""
        return ChatPrompt(self.tokenizer.encode_prompt(text), spelled_token=self.tokenizer.find_special(text))

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> ChatPrompt:
        """The prompt of a conversation, up to where the answer begins."""
        if self.chat_format is None:
            raise ValueError(self.no_chat_format)
        thinking = self.chat_format.choose_thinking(
            thinking=options.thinking, reasoning_effort=options.reasoning_effort
        )
        conversation = read_conversation(
            messages,
            tools=options.tools,
            thinking=thinking,
            reasoning_effort=options.reasoning_effort,
            clear_thinking=options.clear_thinking,
            drop_thinking=options.drop_thinking,
            continue_final_message=options.continue_final_message,
        )
        prompt = render_prompt(conversation, chat_format=self.chat_format, tokenizer=self.tokenizer)
        return replace(prompt, calls=options.calls)


def request_defaults(engine: EngineArgs, sampling: Mapping[str, Any], thinking: bool | None) -> RequestDefaults:
    """Limits and defaults of requests to a model; ValueError for a model that cannot run with these settings."""
    model = read_model_config(engine)
    limits = RequestLimits(
        vocab_size=model.vocab_size, max_model_len=engine.max_model_len or model.max_position_embeddings
    )
    return defaults_within(limits, engine, sampling, thinking)


def defaults_within(
    limits: RequestLimits, engine: EngineArgs, sampling: Mapping[str, Any], thinking: bool | None
) -> RequestDefaults:
    """`request_defaults` where the limits are known: loads the tokenizer, and no torch."""
    prompts = ModelPrompts.from_pretrained(engine.model, engine.chat_format)
    tokenizer = None if prompts is None else prompts.tokenizer
    return RequestDefaults(
        limits=limits,
        encoder=prompts,
        tokenizer=tokenizer,
        structured_outputs=StructuredOutputs(tokenizer, limits.vocab_size),
        sampling=engine.sampling_defaults | dict(sampling),
        thinking=thinking,
    )
