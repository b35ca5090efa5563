"""The engine on one rank: what a request asks for is what it gets, and a broken row harms nobody else."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import Store  # type: ignore[attr-defined]

from shoal.parallel.collectives import Communicator
from shoal.parallel.config import ParallelConfig
from shoal.parallel.groups import ParallelGroups, init_groups, single_process_groups
from shoal.parallel.placement import default_placement
from shoal.parallel.request_id import RequestId
from shoal.runtime.checkpoint.checkpoint import Checkpoint
from shoal.runtime.engine import model_loading
from shoal.runtime.engine.build import build_engine
from shoal.runtime.engine.config import EngineConfig
from shoal.runtime.engine.engine import Engine
from shoal.runtime.kv_cache.cache import bytes_per_block
from shoal.runtime.memory_estimate import declare_model
from shoal.runtime.models.deepseek import cache_specs
from shoal.runtime.models.families import read_config
from shoal.runtime.models.weights import TensorWeight
from shoal.runtime.random_checkpoint import make_checkpoint
from shoal.runtime.scheduling.batch import Batch
from shoal.runtime.tokenization.byte_tokenizer import write_byte_tokenizer
from shoal.runtime.types import Finished, Prefilled, Request, RequestOutput, SamplingParams, Tokens
from tests.support.answers import Answers
from tests.support.harness import logits_in_chunks, make_runner
from tests.support.spawn import run_ranks

PROMPT = list(range(3, 23))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """V3.2 with a byte tokenizer, whose vocabulary the model has."""
    path = tmp_path_factory.mktemp("model")
    make_checkpoint(path, "deepseek_v32", seed=21, dtype=torch.float32, overrides={"vocab_size": 272})
    assert write_byte_tokenizer(path / "tokenizer.json") == 272
    return path


def make_engine(model_dir: Path, **settings: Any) -> Engine:
    defaults: dict[str, Any] = {"block_size": 4, "num_kv_blocks": 64, "max_model_len": 128, "max_num_seqs": 8}
    return build_engine(model_dir, EngineConfig(**{**defaults, **settings}), single_process_groups())


def request(name: str, prompt: list[int], report: Literal["interval", "step"] = "interval", **params: Any) -> Request:
    settings = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **params})
    return Request(request_id=name, prompt_token_ids=tuple(prompt), params=settings, report=report)


def run(engine: Engine, *requests: Request) -> dict[str, RequestOutput]:
    answers = Answers(requests)
    for one in requests:
        engine.add_request(one)
    while engine.has_unfinished:
        answers.take(engine.step().outputs)
        engine.block_manager.check_integrity()
    assert engine.step().idle
    return answers.finished


def greedy(model_dir: Path, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """Without an engine: one forward pass over everything known, for every token."""
    tokens, logprobs = list(prompt), []
    for _ in range(count):
        last = logits_in_chunks(make_runner(model_dir), tokens, [len(tokens)])[-1].double().log_softmax(0)
        tokens.append(int(last.argmax()))
        logprobs.append(float(last.max()))
    return tokens[len(prompt) :], logprobs


def test_greedy_tokens_and_logprobs_are_those_of_plain_forward_passes(model_dir: Path) -> None:
    tokens, logprobs = greedy(model_dir, PROMPT, 6)
    output = run(make_engine(model_dir), request("a", PROMPT, max_tokens=6, logprobs=2, ignore_eos=True))["a"]
    completion = output.outputs[0]
    assert completion.token_ids == tokens
    assert completion.finish_reason == "length"
    assert completion.logprobs is not None
    for token, expected, entries in zip(tokens, logprobs, completion.logprobs, strict=True):
        assert entries[token].rank == 1
        assert len(entries) == 2
        assert entries[token].logprob == pytest.approx(expected, abs=1e-5)
    assert completion.cumulative_logprob == pytest.approx(sum(logprobs), abs=1e-4)


def test_prompt_logprobs_score_every_prompt_token_but_the_first(model_dir: Path) -> None:
    logits = logits_in_chunks(make_runner(model_dir), PROMPT, [len(PROMPT)]).double().log_softmax(1)
    engine = make_engine(model_dir, max_chunk_size=7)
    warm = run(engine, request("warm", PROMPT))["warm"]
    output = run(engine, request("a", PROMPT, prompt_logprobs=1))["a"]
    assert output.num_cached_tokens == 0, "scoring needs every position computed"
    assert warm.outputs[0].token_ids == output.outputs[0].token_ids
    scores = output.prompt_logprobs
    assert scores is not None
    assert len(scores) == len(PROMPT)
    assert scores[0] is None
    for position, entries in enumerate(scores[1:]):
        assert entries is not None
        token = PROMPT[position + 1]
        assert entries[token].logprob == pytest.approx(float(logits[position, token]), abs=1e-5)


def test_a_repeated_prompt_is_found_in_the_cache(model_dir: Path) -> None:
    engine = make_engine(model_dir)
    first = run(engine, request("a", PROMPT))["a"]
    second = run(engine, request("b", PROMPT))["b"]
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 16), "19 tokens before the last: 4 blocks of 4"
    assert second.outputs[0].token_ids == first.outputs[0].token_ids


def test_stop_ids_stop_strings_and_minimum_length(model_dir: Path) -> None:
    engine = make_engine(model_dir)
    plain = run(engine, request("a", PROMPT, ignore_eos=True, skip_special_tokens=False))["a"].outputs[0]
    third = plain.token_ids[2]
    index = plain.token_ids.index(third)
    by_id = run(engine, request("b", PROMPT, ignore_eos=True, stop_token_ids=[third]))["b"].outputs[0]
    assert (by_id.token_ids, by_id.finish_reason, by_id.stop_reason) == (plain.token_ids[: index + 1], "stop", third)
    later = run(engine, request("c", PROMPT, ignore_eos=True, stop_token_ids=[third], min_tokens=index + 2))["c"]
    assert len(later.outputs[0].token_ids) > index + 1, "the stop id is masked until there are min_tokens"
    text = plain.text[1:3]
    by_text = run(engine, request("d", PROMPT, ignore_eos=True, stop=[text], skip_special_tokens=False))["d"].outputs[0]
    assert by_text.finish_reason == "stop"
    assert by_text.stop_reason == text
    assert by_text.text == plain.text[: plain.text.index(text)]


def test_end_of_sequence_ends_and_is_kept(model_dir: Path) -> None:
    engine = make_engine(model_dir)
    eos = engine.processor.eos_token_ids[0]
    forced = run(engine, request("a", PROMPT, logit_bias={eos: 100.0}))["a"].outputs[0]
    assert (forced.token_ids, forced.finish_reason, forced.stop_reason) == ([eos], "stop", None)
    ignored = run(engine, request("b", PROMPT, logit_bias={eos: 100.0}, ignore_eos=True))["b"].outputs[0]
    assert ignored.token_ids == [eos] * 8


def test_several_continuations_differ_and_do_not_depend_on_each_other(model_dir: Path) -> None:
    engine = make_engine(model_dir)
    both = run(engine, request("a", PROMPT, n=3, temperature=1.5, seed=4))["a"].outputs
    assert [o.index for o in both] == [0, 1, 2]
    assert len({tuple(o.token_ids) for o in both}) == 3
    alone = run(engine, request("b", PROMPT, n=1, temperature=1.5, seed=4))["b"].outputs
    assert alone[0].token_ids == both[0].token_ids


def test_streams_report_every_token_once(model_dir: Path) -> None:
    engine = make_engine(model_dir)
    engine.add_request(request("a", PROMPT, report="step", ignore_eos=True))
    reports = []
    while engine.has_unfinished:
        reports += engine.step().outputs
    tokens = [r for r in reports if isinstance(r, Tokens)]
    assert [(t.start, len(t.token_ids)) for t in tokens] == [(i, 1) for i in range(8)]
    assert [t.text_start for t in tokens] == [sum(len(t.text) for t in tokens[:i]) for i in range(8)]
    assert [type(r) for r in reports] == [Tokens, Prefilled, *[Tokens] * 7, Finished]
    whole = run(engine, request("b", PROMPT, ignore_eos=True))["b"].outputs[0]
    assert [t for report in tokens for t in report.token_ids] == whole.token_ids
    assert "".join(t.text for t in tokens) == whole.text


def test_abort_frees_the_blocks(model_dir: Path) -> None:
    engine = make_engine(model_dir, enable_prefix_caching=False)
    engine.add_request(request("a", PROMPT, n=2))
    engine.step()
    assert engine.block_manager.num_free_blocks < 64
    engine.abort(RequestId("a"))
    engine.abort(RequestId("unknown"))
    assert engine.block_manager.num_free_blocks == 64
    assert not engine.has_unfinished
    assert engine.step().idle


def test_a_row_of_broken_logits_fails_alone_and_is_not_cached(model_dir: Path) -> None:
    expected = run(make_engine(model_dir), request("good", PROMPT, logprobs=1))["good"].outputs[0]
    engine = make_engine(model_dir)
    bad_token = 200
    embedding = dict(engine.runner.model.named_weights())["embed_tokens"]
    assert isinstance(embedding, TensorWeight)
    embedding.data[bad_token] = math.nan
    outputs = run(engine, request("bad", [bad_token] * 9), request("good", PROMPT, logprobs=1))
    bad, good = outputs["bad"].outputs[0], outputs["good"].outputs[0]
    assert (bad.finish_reason, bad.token_ids) == ("error", [])
    assert bad.error is not None
    assert "NaN" in bad.error
    assert good.token_ids == expected.token_ids
    assert good.logprobs == expected.logprobs
    assert run(engine, request("again", [bad_token] * 9))["again"].num_cached_tokens == 0


def test_requests_beyond_the_limits_are_refused(model_dir: Path) -> None:
    engine = make_engine(model_dir, max_model_len=32)
    cases: list[tuple[list[int], dict[str, Any], str]] = [
        ([], {}, "empty"),
        ([1, 272], {}, "outside the vocabulary"),
        ([-1], {}, "outside the vocabulary"),
        (list(range(32)), {}, "maximum context length is 32 tokens"),
        ([1], {"stop_token_ids": [999]}, "stop token id 999"),
        ([1], {"logit_bias": {999: 1.0}}, "logit_bias token id 999"),
        ([1], {"n": 1000, "logprobs": 200, "max_tokens": None}, "at most 4000000"),
    ]
    for prompt, params, message in cases:
        with pytest.raises(ValueError, match=message):
            engine.add_request(request("x", prompt, **params))
    engine.add_request(request("a", [5]))
    with pytest.raises(ValueError, match="already running"):
        engine.add_request(request("a", [5]))
    engine.abort(RequestId("a"))
    assert run(engine, request("a", [5]))["a"].finished


def test_output_ends_where_the_context_does(model_dir: Path) -> None:
    engine = make_engine(model_dir, max_model_len=24)
    completion = run(engine, request("a", PROMPT, max_tokens=None, ignore_eos=True))["a"].outputs[0]
    assert (len(completion.token_ids), completion.finish_reason) == (4, "length")


def test_the_cache_takes_its_share_of_the_memory(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = cache_specs(read_config(model_dir), torch.float32)
    monkeypatch.setattr(model_loading, "available_memory", lambda _: 12 * bytes_per_block(specs, 4))

    def blocks(device: str = "cpu", local_world_size: int = 1, **settings: Any) -> int:
        groups = replace(single_process_groups(torch.device(device)), local_world_size=local_world_size)
        return model_loading._num_kv_blocks(EngineConfig(block_size=4, **settings), groups, specs, 1024)

    assert blocks() == 6
    assert blocks(kv_cache_memory_fraction=0.8) == 9
    assert blocks(local_world_size=2) == 3
    assert blocks(device="cuda", local_world_size=2) == 6, "every rank has a GPU of its own"
    assert blocks(num_kv_blocks=11) == 11


def test_settings_that_cannot_work_are_refused(model_dir: Path) -> None:
    with pytest.raises(ValueError, match="less than max_model_len = 128"):
        make_engine(model_dir, num_kv_blocks=8)
    limit = read_config(model_dir).max_position_embeddings
    with pytest.raises(ValueError, match=f"max_position_embeddings \\({limit}\\)"):
        make_engine(model_dir, max_model_len=limit + 1)


def test_fp8_weights_give_what_their_dequantised_copy_gives(tmp_path: Path) -> None:
    """576 and other sizes that are no multiple of 128 have ragged blocks."""
    make_checkpoint(tmp_path / "fp8", "deepseek_v3", seed=8, dtype=torch.bfloat16, fp8=True, num_shards=3)
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    with Checkpoint(tmp_path / "fp8") as checkpoint:
        assert any(checkpoint.dtype(name) is torch.float8_e4m3fn for name in checkpoint.names)
        plain = {
            name: checkpoint.read(name, dtype=torch.bfloat16)
            for name in checkpoint.names
            if not name.endswith("_scale_inv")
        }
    (tmp_path / "bf16").mkdir()
    save_file(plain, tmp_path / "bf16" / "model.safetensors")
    del config["quantization_config"]
    (tmp_path / "bf16" / "config.json").write_text(json.dumps(config))
    (tmp_path / "fp8" / "tokenizer.json").unlink()
    outputs = [
        run(make_engine(tmp_path / name), request("a", PROMPT, logprobs=1))["a"].outputs[0] for name in ("fp8", "bf16")
    ]
    assert outputs[0].token_ids == outputs[1].token_ids
    assert outputs[0].logprobs == outputs[1].logprobs


def test_a_rank_holds_its_shard_and_at_most_one_more_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read but not yet packed never exceeds the largest tensor (gate and up of one module count as one)."""
    make_checkpoint(tmp_path, "deepseek_v3", seed=1, dtype=torch.bfloat16, overrides={"num_attention_heads": 4})
    config = read_config(tmp_path)
    sizes: list[int] = []
    read = Checkpoint.read

    def counting(self: Checkpoint, *args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = read(self, *args, **kwargs)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, "a slice must not keep the whole alive"
        sizes.append(tensor.numel())
        return tensor

    monkeypatch.setattr(Checkpoint, "read", counting)
    totals = {}
    for tp, dp, local_world_size in [(1, 1, 1), (2, 1, 2), (1, 4, 1), (1, 4, 4)]:
        sizes.clear()
        layout = ParallelConfig(tensor_parallel_size=tp, data_parallel_size=dp)
        with Checkpoint(tmp_path) as checkpoint:
            declare_model(config, layout, local_world_size=local_world_size).load(checkpoint)
        totals[tp, dp, local_world_size] = sum(sizes)
    experts = (config.num_hidden_layers - config.first_k_dense_replace) * config.n_routed_experts
    of_experts = experts * 3 * config.hidden_size * config.moe_intermediate_size
    alone = totals[1, 1, 1]
    assert alone - totals[1, 4, 1] == of_experts * 3 // 4, "a quarter of the experts, all of the rest"
    head = config.vocab_size * config.hidden_size
    assert alone - totals[1, 4, 4] == (of_experts + head) * 3 // 4, "on one node, a quarter of the head too"
    assert totals[2, 1, 2] < alone * 0.65


def start_together(rank: int, store: Store, model_dir: Path) -> list[tuple[bool, bool, int]]:
    """(woke, idle, tokens computed) of the first steps; rank 1 hears of its request only after rank 0 has begun."""
    groups = init_groups(ParallelConfig(data_parallel_size=2), rank, store, timeout_s=60.0)
    engine = build_engine(model_dir, EngineConfig(num_kv_blocks=8, block_size=8, max_model_len=32), groups)
    request = Request(request_id="r", prompt_token_ids=(3, 4, 5), params=SamplingParams(max_tokens=1), index=0)
    computed: list[int] = []
    run = engine.runner.run

    def counting(batch: Batch, *args: Any) -> torch.Tensor:
        computed.append(batch.num_tokens)
        return run(batch, *args)

    engine.runner.run = counting  # type: ignore[method-assign, assignment]
    steps = []
    for number in range(4):
        if number == 1 + rank:
            engine.add_request(request)
        computed.clear()
        result = engine.step()
        steps.append((result.woke, result.idle, sum(computed)))
    return steps


def test_ranks_that_were_idle_start_together(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v3")
    # nobody has work | rank 0 has some: both wake | both compute | nobody has work
    expected = [(False, True, 0), (True, False, 0), (False, False, 3), (False, True, 0)]
    assert run_ranks(start_together, 2, tmp_path, timeout_s=600) == [expected, expected]


def test_experts_are_spread_on_one_node_and_kept_together_over_several() -> None:
    def of_rank_1(local_world_size: int) -> list[int]:
        comm = Communicator(1, 2)
        layout = ParallelConfig(data_parallel_size=2)
        groups = ParallelGroups(layout, 1, torch.device("cpu"), comm, Communicator(), local_world_size)
        return default_placement(16, groups).local_experts(1)

    assert of_rank_1(2) == list(range(1, 16, 2))
    assert of_rank_1(1) == list(range(8, 16))


def test_an_engine_does_not_change_the_kernels_of_the_next(model_dir: Path) -> None:
    """The kernels of an engine that is refused, or that runs on the reference, are nobody else's."""
    prompt = request("a", PROMPT)
    expected = run(make_engine(model_dir), prompt)["a"].outputs
    reference = make_engine(model_dir, kernel_backend="reference", invariance="relaxed")
    with pytest.raises(ValueError, match="set invariance to relaxed"):
        make_engine(model_dir, kernel_backend="reference")
    with pytest.raises(ValueError, match='kernels "cpu" do not run on a GPU'):
        build_engine(model_dir, EngineConfig(kernel_backend="cpu"), single_process_groups(torch.device("cuda")))
    first, second = make_engine(model_dir), make_engine(model_dir)
    run(reference, prompt)
    assert run(first, prompt)["a"].outputs == expected
    assert run(second, prompt)["a"].outputs == expected
