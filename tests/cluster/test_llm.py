"""The Python front door: prompts in every form, order, errors, streams and several callers at a time."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

import shoal
from shoal.cluster.llm import LLM, params_list, prompt_list, token_id_tuple
from shoal.cluster.replicas.inprocess import InProcessEngine
from shoal.cluster.workers.engine_factory import BUILD_PROFILED_ENGINE
from shoal.runtime.random_checkpoint import make_checkpoint, tiny_config
from shoal.runtime.tokenization.byte_tokenizer import write_byte_tokenizer
from shoal.runtime.types import RequestOutput, SamplingParams
from tests.support.stub_engine import RAISES, REFUSED, STUB

BOS, THINK, END_THINK, USER, ASSISTANT = 0, 259, 260, 261, 262


def three(max_tokens: int = 3) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens)


def text_ids(text: str) -> list[int]:
    """Token ids of a text under the tokenizer of single bytes."""
    return [3 + byte for byte in text.encode()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model directory without weights, which a stub does not miss."""
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(tiny_config("deepseek_v3")))
    write_byte_tokenizer(path / "tokenizer.json")
    return str(path)


@pytest.fixture
def llm(model: str) -> Iterator[LLM]:
    threads = torch.get_num_threads()
    with LLM(model, engine_factory=STUB, max_num_seqs=2, num_threads_per_worker=1) as llm:
        yield llm
    torch.set_num_threads(threads)


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    assert shoal.LLM is LLM
    lengths = [9, 1, 5, 2, 7, 3, 8, 1]  # more than the engine takes at a time
    outputs = llm.generate([[i, i] for i in range(8)], [three(n) for n in lengths])
    assert tokens(outputs) == [[2 * i + k for k in range(n)] for i, n in enumerate(lengths)]
    assert [output.prompt_token_ids for output in outputs] == [[i, i] for i in range(8)]
    assert [output.request_id for output in outputs] == [str(i) for i in range(8)]
    assert [output.request_id for output in llm.generate([[1], [1]], three())] == ["8", "9"]
    assert llm.generate([], three()) == []


def test_every_form_of_a_prompt_is_taken(llm: LLM) -> None:
    ids = [BOS, *text_ids("hi")]
    one: list[Any] = ["hi", {"prompt": "hi"}, ids, tuple(ids), np.array(ids), {"prompt_token_ids": ids}]
    for prompt in one:
        (output,) = llm.generate(prompt, three(1))
        assert (output.prompt_token_ids, tokens([output])) == (ids, [[sum(ids)]])
    mixed: list[Any] = ["hi", ids, {"prompt": "a"}]
    outputs = llm.generate(mixed, three(1))
    assert [output.prompt for output in outputs] == ["hi", None, "a"]
    assert [output.prompt_token_ids for output in outputs] == [ids, ids, [BOS, *text_ids("a")]]


def test_lists_of_prompts_and_parameters() -> None:
    assert prompt_list("a") == ["a"]
    mixed: list[Any] = ["a", [1]]
    assert prompt_list(mixed) == ["a", [1]]
    assert prompt_list([1, 2]) == [(1, 2)]
    assert prompt_list([[1, 2]]) == [[1, 2]]
    assert prompt_list([]) == []
    assert prompt_list(np.array([1, 2])) == [(1, 2)]  # type: ignore[arg-type]
    assert prompt_list(torch.tensor([[1, 2], [3, 4]])) == [[1, 2], [3, 4]]  # type: ignore[arg-type]
    assert params_list(three(), 2) == [three(), three()]
    assert params_list([three(1), three(2)], 2) == [three(1), three(2)]
    with pytest.raises(ValueError, match="3 prompts and 2 sampling_params"):
        params_list([three(), three()], 3)
    assert token_id_tuple([1.0, np.int32(2)]) == (1, 2)
    for bad in ([1.5], [True], ["1"], [None], 3, [[1]]):
        with pytest.raises(ValueError, match="whole numbers"):
            token_id_tuple(bad)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ([], "the prompt is empty"),
        ([1, 1000], r"prompt token id 1000 is outside the vocabulary \[0, 1000\)"),
        ([-1], "prompt token id -1"),
        ([1] * 128, "the prompt has 128"),
        ([1.5], "whole numbers"),
        ({"prompt": [1]}, "prompt must be text"),
        ({"prompt_token_ids": "a"}, "prompt_token_ids must be a list"),
        ({"text": "a"}, 'either "prompt" or "prompt_token_ids"'),
        ("\ud800", "surrogate"),
    ],
)
def test_a_bad_prompt_is_named_by_its_position_and_nothing_runs(llm: LLM, prompt: Any, says: str) -> None:
    with pytest.raises(ValueError, match=f"^prompt 2: .*{says}"):
        llm.generate(["a", "b", prompt], three())
    assert llm.generate("a", three(1))[0].request_id == "0"


def test_a_request_beyond_the_budget_is_refused(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"prompt 0: .*at most"):
        llm.generate("a", SamplingParams(n=1024, max_tokens=100, logprobs=999))


def test_what_the_engine_refuses_is_an_error_of_that_output_only(llm: LLM) -> None:
    outputs = llm.generate([[REFUSED], [1]], three())
    assert [output.outputs[0].finish_reason for output in outputs] == ["error", "length"]
    assert outputs[0].outputs[0].error == "refused by the stub"


def test_chat_renders_conversations(llm: LLM) -> None:
    (one,) = llm.chat([{"role": "user", "content": "hi"}], three())
    assert one.prompt_token_ids == [BOS, USER, *text_ids("hi"), ASSISTANT, END_THINK]
    talks = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
    outputs = llm.chat(talks, three(), thinking=True)
    assert [o.prompt_token_ids for o in outputs] == [[BOS, USER, *text_ids(c), ASSISTANT, THINK] for c in "ab"]
    messages = [output.outputs[0].message for output in (one, *outputs)]
    assert [sorted(message or {}) for message in messages] == [
        ["content", "role"],
        *[["content", "reasoning_content", "role"]] * 2,
    ]
    with pytest.raises(ValueError, match=r"conversation 1: .*role"):
        llm.chat([talks[0], [{"role": "robot", "content": "b"}]])


def test_chat_shows_tools(llm: LLM) -> None:
    tool = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object"}}}
    talk = [{"role": "user", "content": "hi"}]
    with pytest.raises(ValueError, match="the prompt has 489"):  # with the tools: the stub takes 128
        llm.chat(talk, three(), tools=[tool])
    (hidden,) = llm.chat(talk, three(), tools=[tool], tool_choice="none")
    assert hidden.prompt_token_ids == [BOS, USER, *text_ids("hi"), ASSISTANT, END_THINK]
    with pytest.raises(ValueError, match=r"tools\[0\]\.function\.name must be a non-empty string"):
        llm.chat(talk, tools=[{"type": "function", "function": {}}])
    with pytest.raises(ValueError, match="tool_choice must be auto, none, required, or"):
        llm.chat(talk, tools=[tool], tool_choice="always")


def test_names_of_vllm_are_taken(llm: LLM) -> None:
    talk = [{"role": "user", "content": "a"}]
    expected = [BOS, USER, *text_ids("a"), ASSISTANT, THINK]
    for kwargs in ({"thinking": True}, {"enable_thinking": True}, {"thinking": True, "enable_thinking": None}):
        (output,) = llm.chat(talk, three(), use_tqdm=False, chat_template_kwargs=kwargs)
        assert output.prompt_token_ids == expected
    with pytest.raises(ValueError, match=r"chat_template_kwargs\.think is not a known field; did you mean thinking"):
        llm.chat(talk, chat_template_kwargs={"think": True})
    started = [*talk, {"role": "assistant", "content": "b"}]
    (output,) = llm.chat(started, three(), add_generation_prompt=False, continue_final_message=True)
    assert output.prompt_token_ids == [BOS, USER, *text_ids("a"), ASSISTANT, END_THINK, *text_ids("b")]
    with pytest.raises(ValueError, match="continue_final_message"):
        llm.chat(started, continue_final_message=True)
    outputs = llm.generate([np.array([5, 6]), np.array([7])], three(1), use_tqdm=False)  # type: ignore[arg-type]
    assert [output.prompt_token_ids for output in outputs] == [[5, 6], [7]]
    assert llm.get_tokenizer().encode("a") == text_ids("a")
    params = SamplingParams(max_tokens=np.int64(4), temperature=np.float32(0.5), stop_token_ids=np.array([7]))  # type: ignore[arg-type]
    assert (params.max_tokens, params.temperature, params.stop_token_ids) == (4, 0.5, (7,))
    assert [type(x) for x in (params.max_tokens, params.temperature)] == [int, float]


def test_prompts_without_parameters_get_those_of_generation_config(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((Path(model) / name).read_bytes())
    defaults = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "max_new_tokens": 2.0, "eos_token_id": 1}
    (tmp_path / "generation_config.json").write_text(json.dumps(defaults))
    shape: dict[str, Any] = {"engine_factory": STUB, "num_threads_per_worker": 1}
    threads = torch.get_num_threads()
    with LLM(str(tmp_path), **shape) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(temperature=0.6, top_p=0.95, max_tokens=2)
        assert [len(ids) for ids in tokens(llm.generate([[5]]))] == [2]
        assert [len(ids) for ids in tokens(llm.generate([[5]], three()))] == [3]
    assert "temperature 0.6, top_p 0.95, max_tokens 2; set generation_config to none" in caplog.text
    caplog.clear()
    for word in ("none", "vllm"):
        with LLM(str(tmp_path), generation_config=word, **shape) as llm:
            assert llm.get_default_sampling_params() == SamplingParams()
    assert caplog.text == ""
    torch.set_num_threads(threads)
    with pytest.raises(ValueError, match="generation_config must be one of auto, none, vllm, got 'off'"):
        LLM(str(tmp_path), generation_config="off", **shape)
    (tmp_path / "generation_config.json").write_text('{"top_p": 2}')
    with pytest.raises(ValueError, match=r"generation_config\.json: top_p must be .*; correct it, or set"):
        LLM(str(tmp_path), **shape)


def test_a_stream_grows_and_ends(llm: LLM) -> None:
    async def collect() -> list[RequestOutput]:
        return [output async for output in llm.stream([[1], [5]], [three(2), three(3)])]

    outputs = asyncio.run(collect())
    by_id = {i: [o for o in outputs if o.request_id == i] for i in ("0", "1")}
    assert [o.finished for o in by_id["1"]] == [False, False, True]
    assert [len(o.outputs[0].text) for o in by_id["1"]] == [1, 2, 3]
    assert tokens(by_id["0"])[-1] == [1, 2]


def test_a_stream_that_is_left_is_aborted(llm: LLM) -> None:
    async def first() -> list[int]:
        stream = llm.stream([1], three(10**6))
        output = await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        return output.outputs[0].token_ids

    assert asyncio.run(first()) == [1]
    engines = llm._engines._engines
    assert isinstance(engines, InProcessEngine)
    llm.generate([2], three(1))  # commands are in order: the abort has been taken before this
    assert engines.num_in_flight == 0


def test_threads_and_coroutines_share_the_engines(llm: LLM) -> None:
    def ask(i: int) -> list[list[int]]:
        return tokens(llm.generate([[i], [i + 1]], three()))

    async def stream() -> int:
        return len([output async for output in llm.stream([[7]] * 5, three(4))])

    with ThreadPoolExecutor(5) as pool:
        streamed = pool.submit(lambda: asyncio.run(stream()))
        answers = list(pool.map(ask, range(20)))
    assert answers == [[[i, i + 1, i + 2], [i + 1, i + 2, i + 3]] for i in range(20)]
    assert streamed.result() == 20


def test_a_broken_engine_fails_its_callers_and_those_who_come_later(llm: LLM) -> None:
    with pytest.raises(RuntimeError, match="the stub broke"):
        llm.generate([[1], [RAISES]], three())
    with pytest.raises(RuntimeError, match="the stub broke"):
        llm.generate([1], three())


def test_closing_ends_whoever_waits(model: str) -> None:
    llm = LLM(model, engine_factory=STUB, num_threads_per_worker=1)
    found: list[str] = []

    def wait() -> None:
        try:
            llm.generate([1], three(10**9))
        except RuntimeError as error:
            found.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    for _ in itertools.count():
        if llm._engines._deliver:
            break
    llm.close()
    thread.join(20.0)
    assert found == ["the engines were closed"]
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate([1], three())
    llm.close()


def test_arguments_are_checked(model: str) -> None:
    with pytest.raises(ValueError, match="tensor_parallel is not a known setting; did you mean tensor_parallel_size"):
        LLM(model, tensor_parallel=2)
    with pytest.raises(ValueError, match="executor must be one of auto, ray, inprocess"):
        LLM(model, executor="mp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="runs one worker, but the layout has 4"):
        LLM(model, executor="inprocess", tensor_parallel_size=2, replicas=2)
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        LLM(model + "/nowhere")


@pytest.mark.parametrize(
    ("arguments", "executor"),
    [
        ({}, "inprocess"),
        ({"executor": "ray"}, "ray"),
        ({"data_parallel_size": 2}, "ray"),
        ({"replicas": 2}, "ray"),
        ({"ray_address": "auto"}, "ray"),
        ({"executor": "inprocess", "ray_address": "auto"}, "inprocess"),
    ],
)
def test_one_worker_needs_no_ray(
    model: str, arguments: dict[str, Any], executor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(name: str) -> Any:
        def start(*_: Any, **__: Any) -> None:
            raise LookupError(name)

        return start

    monkeypatch.setattr("shoal.cluster.replicas.start.start_engines", chosen("ray"))
    monkeypatch.setattr("shoal.cluster.replicas.open_engines.InProcessEngine", chosen("inprocess"))
    with pytest.raises(LookupError, match=f"^'?{executor}'?$"):
        LLM(model, engine_factory=STUB, **arguments)


def test_one_process_does_not_load_ray(model: str) -> None:
    code = f"""
import sys
from shoal import LLM
with LLM({model!r}, engine_factory={STUB!r}, executor="inprocess") as llm:
    llm.generate([[3]])
assert "ray" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("deepseek_v3")))
    threads = torch.get_num_threads()
    with LLM(str(tmp_path), engine_factory=STUB, num_threads_per_worker=1) as llm:
        assert tokens(llm.generate([3], three(1))) == [[3]]
        with pytest.raises(ValueError, match=r"prompt 0: .* has no tokenizer\.json"):
            llm.generate("a")
        with pytest.raises(ValueError, match=r"no tokenizer\.json, so there is no chat"):
            llm.chat([{"role": "user", "content": "a"}])
    torch.set_num_threads(threads)


@pytest.mark.ray
def test_four_ranks_on_ray_give_the_bits_of_one_process(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v32", dtype=torch.bfloat16)
    prompts: list[Any] = [[(7 * i + j) % 250 for j in range(3 + 9 * i)] for i in range(6)]
    params = SamplingParams(max_tokens=8, logprobs=2)
    shape: dict[str, Any] = {"max_model_len": 128, "num_kv_blocks": 64, "block_size": 16, "num_threads_per_worker": 1}
    threads = torch.get_num_threads()
    with LLM(str(tmp_path), **shape) as llm:
        reference = llm.generate(prompts, params)
    torch.set_num_threads(threads)
    phases: list[str] = []
    with LLM(
        str(tmp_path),
        tensor_parallel_size=2,
        data_parallel_size=2,
        max_num_seqs=2,
        max_num_batched_tokens=16,
        max_chunk_size=7,
        on_phase=lambda phase: phases.append(phase.name),
        engine_factory=BUILD_PROFILED_ENGINE,
        **shape,
    ) as llm:
        outputs = llm.generate(prompts, params)
        profiles = llm.step_profiles()
    assert not ray.is_initialized()
    assert phases == ["ray", "placement", "workers", "groups", "kernels", "weights", "ready"]
    assert outputs == reference
    assert len({tuple(ids) for ids in tokens(outputs)}) == 6
    assert len(profiles) == 4
    for profile in profiles:  # those that measure their steps say where the time went, leaders and followers alike
        assert profile.num_steps >= 8
        parts = ("attention", "indexer", "dense mlp", "experts", "dispatch", "combine", "logits", "collectives")
        assert min(profile.seconds[phase] for phase in (*parts, "batch building")) > 0, profile
    assert [profile.seconds["sampling"] > 0 for profile in profiles] == [True, False, True, False]
