"""`LLM`: the Python front door."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, Literal, Self

from msgspec.structs import replace

from shoal.runtime.chat.prompt import ChatPrompt
from shoal.runtime.engine.step_profile import StepProfile
from shoal.runtime.generation_config import sampling_notice
from shoal.runtime.plain_numbers import whole_number
from shoal.runtime.request_limits import RequestLimits, check_request
from shoal.runtime.response import ResponseAssembler
from shoal.runtime.structured.structured_outputs import StructuredOutputs
from shoal.runtime.tokenization.tokenizer import Tokenizer
from shoal.runtime.types import EngineOutput, Request, RequestOutput, SamplingParams

from .bundled import BUNDLED_MODEL
from .engine_args import EngineArgs, Executor
from .metrics.export import make_meter
from .openai.chat_options import read_chat_options
from .openai.errors import ApiError
from .openai.fields import without_nulls
from .openai.prompt_params import prompt_params
from .openai.responses import parsed_answer
from .prompts import ModelPrompts
from .replicas.engine_thread import EngineThread
from .replicas.open_engines import choose_executor, open_engines
from .workers.engine_factory import BUILD_ENGINE
from .workers.spec import OnPhase

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, {"prompt": text} or {"prompt_token_ids": ids}."""
Updates = list[EngineOutput | RequestOutput]
Conversation = Sequence[Mapping[str, Any]]

logger = logging.getLogger("shoal.llm")


class LLM:
    """A model that answers prompts. Its answers do not depend on the layout.

    `LLM(model="dir", tensor_parallel_size=2, ...)` takes every field of `EngineArgs`. The executor "inprocess" runs one
    engine on a thread of this process, "ray" runs workers on a Ray cluster; "auto" is "ray" for more than one worker or
    a given `ray_address`, else "inprocess". Methods may be called from several threads at a time. A context manager.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        executor: Executor = "auto",
        on_phase: OnPhase | None = None,
        engine_factory: str = BUILD_ENGINE,
        **engine_args: Any,
    ) -> None:
        """ValueError for an unknown or bad argument, LayoutDoesNotFit for a cluster that is too small.

        `model` None is shoal-tiny, the trained model inside this package.
        `on_phase` is called after every part of the start-up. `engine_factory` replaces the engine, for tests.
        """
        args = EngineArgs.from_dict({"model": str(BUNDLED_MODEL if model is None else model), **engine_args})
        if executor not in ("auto", "ray", "inprocess"):
            raise ValueError(f"executor must be one of auto, ray, inprocess, got {executor!r}")
        if executor == "auto":
            executor = choose_executor(args)

        self.args = args
        self.executor = executor
        """The one that runs: "ray" or "inprocess"."""
        self._prompts = ModelPrompts.from_pretrained(args.model, args.chat_format)
        self.tokenizer = None if self._prompts is None else self._prompts.tokenizer
        self._sampling_defaults = args.sampling_defaults
        if self._sampling_defaults:
            logger.warning(sampling_notice(self._sampling_defaults))
        self._engines = EngineThread(
            lambda: open_engines(args, executor, on_phase=on_phase, engine_factory=engine_factory),
            lambda: make_meter(args, on_ray=self.executor == "ray"),
        )
        self._structured_outputs = StructuredOutputs(self.tokenizer, self.limits.vocab_size)
        self._indices = itertools.count()

    @property
    def limits(self) -> RequestLimits:
        """Vocabulary size and longest context of a request."""
        return self._engines.limits

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer; ValueError if the model directory has none."""
        if self.tokenizer is None:
            raise ValueError(f"{self.args.model} has no tokenizer.json")
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Sampling parameters of prompts without any: generation_config.json's values, unless that is turned off."""
        return SamplingParams(**self._sampling_defaults)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """One output per prompt, in order. One `sampling_params` serves all prompts; None is the model's defaults.

        ValueError for a bad prompt, naming its position, before any of them is run. A prompt without a seed gets one
        from the engine's seed and its number among all prompts that this object was given. `use_tqdm` is vLLM's: there
        is no progress bar, and so nothing to turn off.
        """
        return self._run(self._requests(prompt_list(prompts), sampling_params, report="interval"))

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        thinking: bool | None = None,
        reasoning_effort: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[RequestOutput]:
        """Like `generate`, for one conversation (a list of {"role", "content"}) or a list of them.

        Each output has the `message` of the answer, with its reasoning, content and tool calls, besides its text.
        `thinking` None is as the model's chat format does; `chat_template_kwargs` {"thinking": true}, or
        {"enable_thinking": true}, is the same as `thinking=True`. The other options are those of OpenAI's API.
        `continue_final_message=True` with `add_generation_prompt=False` continues a last assistant message.
        """
        if continue_final_message is add_generation_prompt:
            raise ValueError("give continue_final_message=True and add_generation_prompt=False together, or neither")
        body = {
            "tools": tools,
            "tool_choice": tool_choice,
            "reasoning_effort": reasoning_effort,
            "chat_template_kwargs": chat_template_kwargs,
            "continue_final_message": continue_final_message,
        }
        try:
            options = read_chat_options(without_nulls(body), thinking=thinking)
        except ApiError as error:
            raise ValueError(error.message) from error
        several: list[Any] = list(messages)
        conversations = [several] if several and isinstance(several[0], Mapping) else several
        if self._prompts is None:
            raise ValueError(
                f"{self.args.model} has no tokenizer.json, so there is no chat; use generate with prompt_token_ids"
            )
        prompts: list[ChatPrompt] = []
        for i, conversation in enumerate(conversations):
            try:
                prompts.append(self._prompts.encode_chat(conversation, options))
            except ValueError as error:
                raise ValueError(f"conversation {i}: {error}") from error
        requests = self._requests(prompts, sampling_params, report="interval")
        outputs = self._run(requests)
        for output, prompt, (request, _) in zip(outputs, prompts, requests, strict=True):
            self._add_messages(output, prompt, request.params)
        return outputs

    def _add_messages(self, output: RequestOutput, prompt: ChatPrompt, params: SamplingParams) -> None:
        assert prompt.output_format is not None
        for sample in output.outputs:
            answer = parsed_answer(
                sample,
                prompt.output_format,
                id=f"{output.request_id}/{sample.index}",
                tokenizer=self.get_tokenizer(),
                skip_special_tokens=params.skip_special_tokens,
            )
            sample.message = answer["message"]

    async def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Outputs as they grow, each with everything generated so far for its prompt; `request_id`s ascend.

        Leaving the loop early aborts the requests that are not finished.
        """
        requests = self._requests(prompt_list(prompts), sampling_params, report="step")
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Updates | BaseException] = asyncio.Queue()

        def deliver(item: Updates | BaseException) -> None:
            with contextlib.suppress(RuntimeError):  # the loop may have been closed before its last outputs came
                loop.call_soon_threadsafe(arrived.put_nowait, item)

        texts = {request.request_id: text for request, text in requests}
        responses = {request.request_id: ResponseAssembler(request) for request, _ in requests}
        self._engines.submit([request for request, _ in requests], deliver)
        try:
            while responses:
                item = await arrived.get()
                if isinstance(item, BaseException):
                    raise item
                for output in _snapshots(item, responses):
                    if output.finished:
                        del responses[output.request_id]
                    output.prompt = texts[output.request_id]
                    yield output
        finally:
            self._engines.abort(sorted(responses))

    def step_profiles(self) -> list[StepProfile]:
        """Time per part of a step, for every rank; needs an `engine_factory` whose engines measure it."""
        return self._engines.step_profiles()

    def close(self) -> None:
        """Stop the engines; requests of other threads fail. Closing twice is allowed."""
        self._engines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _requests(
        self,
        prompts: Sequence[Prompt | ChatPrompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        *,
        report: Literal["interval", "step"],
    ) -> list[tuple[Request, str | None]]:
        """Checked requests with the texts of their prompts, where those were texts."""
        per_prompt = params_list(self.get_default_sampling_params() if params is None else params, len(prompts))
        requests = []
        spelled: list[str] = []
        for i, (prompt, own) in enumerate(zip(prompts, per_prompt, strict=True)):
            try:
                text, encoded = (None, prompt) if isinstance(prompt, ChatPrompt) else self._encode(prompt)
            except ValueError as error:
                raise ValueError(f"prompt {i}: {error}") from error
            request = Request(
                request_id="",
                prompt_token_ids=tuple(encoded.token_ids),
                params=prompt_params(own, encoded, self.tokenizer),
                report=report,
                reasoning_end_token_id=encoded.reasoning_end_token_id,
            )
            if (refused := check_request(request, self._engines.limits)) is not None:
                raise ValueError(f"prompt {i}: {refused.message}")
            try:
                self._structured_outputs.check(request.params)
            except ValueError as error:
                raise ValueError(f"prompt {i}: {error}") from error
            requests.append((request, text))
            if encoded.spelled_token is not None:
                spelled.append(encoded.spelled_token)
        if spelled:
            logger.warning(
                "%d prompts have special tokens such as %s in their text; they are encoded as text: use chat, or give "
                "token ids",
                len(spelled),
                spelled[0],
            )
        return [(self._numbered(request), text) for request, text in requests]

    def _numbered(self, request: Request) -> Request:
        index = next(self._indices)
        return replace(request, request_id=str(index), index=index)

    def _encode(self, prompt: Prompt) -> tuple[str | None, ChatPrompt]:
        """The text, if the prompt is one, and the token ids."""
        if isinstance(prompt, Mapping):
            if set(prompt) not in ({"prompt"}, {"prompt_token_ids"}):
                raise ValueError(f'must have either "prompt" or "prompt_token_ids", got {sorted(map(str, prompt))}')
            (name, value), *_ = prompt.items()
            if isinstance(value, str) != (name == "prompt"):
                raise ValueError(f"{name} must be {'text' if name == 'prompt' else 'a list of token ids'}")
            prompt = value
        if not isinstance(prompt, str):
            return None, ChatPrompt(list(token_id_tuple(prompt)))
        if self._prompts is None:
            raise ValueError(f"{self.args.model} has no tokenizer.json; give prompt_token_ids instead of text")
        return prompt, self._prompts.encode_text(prompt)

    def _run(self, requests: Sequence[tuple[Request, str | None]]) -> list[RequestOutput]:
        arrived: queue.SimpleQueue[Updates | BaseException] = queue.SimpleQueue()
        outputs: dict[str, RequestOutput] = {}
        self._engines.submit([request for request, _ in requests], arrived.put)
        try:
            while len(outputs) < len(requests):
                item = arrived.get()
                if isinstance(item, BaseException):
                    raise item
                outputs |= {output.request_id: output for output in item if isinstance(output, RequestOutput)}
        finally:
            self._engines.abort([r.request_id for r, _ in requests if r.request_id not in outputs])
        for request, text in requests:
            outputs[request.request_id].prompt = text
        return [outputs[request.request_id] for request, _ in requests]


def _snapshots(updates: Updates, responses: Mapping[str, ResponseAssembler]) -> list[RequestOutput]:
    """Everything that each request in `updates` has produced so far, in the order in which they first appear."""
    latest: dict[str, RequestOutput | None] = {}
    for update in updates:
        if isinstance(update, RequestOutput):
            latest[update.request_id] = update
        else:
            responses[update.request_id].add(update)
            latest.setdefault(update.request_id, None)
    return [responses[request_id].output() if output is None else output for request_id, output in latest.items()]


def prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """The prompts of an argument that is one or many: a list or an array of numbers is one prompt of token ids."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    many: list[Any] = prompts.tolist() if hasattr(prompts, "tolist") else list(prompts)
    if many and whole_number(many[0]) is not None:
        return [token_id_tuple(many)]
    return many


def params_list(params: SamplingParams | Sequence[SamplingParams], count: int) -> list[SamplingParams]:
    """One for each of `count` prompts."""
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise ValueError(
            f"there are {count} prompts and {len(params)} sampling_params; give one for all or one for each"
        )
    if not all(isinstance(p, SamplingParams) for p in params):
        raise ValueError("sampling_params must be SamplingParams or a list of them")
    return list(params)


def token_id_tuple(values: Any) -> tuple[int, ...]:
    """Token ids as plain integers, from a list or an array; ValueError for anything else."""
    values = values.tolist() if hasattr(values, "tolist") else values  # numpy's and torch's, in one step
    token_ids = [whole_number(value) for value in values] if isinstance(values, Iterable) else [None]
    if any(token_id is None for token_id in token_ids):
        raise ValueError("a prompt must be text or a list of token ids (whole numbers)")
    return tuple(token_id for token_id in token_ids if token_id is not None)
