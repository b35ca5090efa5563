"""What a prompt says of the answer to it, as sampling parameters."""

from __future__ import annotations

from msgspec.structs import replace

from shoal.parallel.settings import SettingError
from shoal.runtime.chat.call_grammar import CallRules, call_grammar
from shoal.runtime.chat.prompt import ChatPrompt
from shoal.runtime.structured_params import StructuredOutputsParams
from shoal.runtime.tokenization.tokenizer import Tokenizer
from shoal.runtime.types import SamplingParams


def prompt_params(params: SamplingParams, prompt: ChatPrompt, tokenizer: Tokenizer | None) -> SamplingParams:
    """The parameters with the form of the answer, where calls are asked for, and the tokens that end a turn.

    ValueError for parameters that ask for another form, and for tools that cannot be written in the chat format.
    """
    form = _form(params, prompt, tokenizer)
    if form is not params.structured_outputs:
        params = replace(params, structured_outputs=form)
    if not prompt.stop_token_ids or params.ignore_eos:
        return params
    stop_token_ids = (*(params.stop_token_ids or ()), *prompt.stop_token_ids)
    return replace(params, stop_token_ids=stop_token_ids)


def _form(params: SamplingParams, prompt: ChatPrompt, tokenizer: Tokenizer | None) -> StructuredOutputsParams | None:
    """The form of the answer: what was asked for, calls, or either of them."""
    asked = params.structured_outputs
    output_format = prompt.output_format
    if output_format is None or not output_format.tools or (asked is None and prompt.calls is None):
        return asked
    assert tokenizer is not None, "a chat prompt was encoded without a tokenizer"
    rules = prompt.calls or CallRules(is_required=False)
    if asked is None:
        text = None
    elif rules.is_required:
        message = (
            "tool_choice asks for calls and for nothing else; remove response_format, structured_outputs and guided_*"
        )
        raise SettingError("structured_outputs", message)
    elif asked.json_object:
        text = '%json {"type": "object"}'
    elif asked.json is not None:
        text = f"%json {asked.json}"
    else:
        message = "beside tools, an answer can be JSON but no other form; remove tools, or set tool_choice to none"
        raise SettingError("structured_outputs", message)
    lark = call_grammar(output_format.grammar, output_format.tools, rules, tokenizer, text=text)
    return StructuredOutputsParams(grammar=lark)
