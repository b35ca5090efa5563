"""A prompt computed by one engine and continued by another: the same bits as one engine, whatever gets lost between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from shoal.parallel.groups import single_process_groups
from shoal.parallel.kv_transport import KVChunk
from shoal.parallel.request_id import RequestId
from shoal.runtime.engine.build import TRANSFER_TIMEOUT_S, build_engine
from shoal.runtime.engine.config import EngineConfig
from shoal.runtime.engine.engine import Engine
from shoal.runtime.random_checkpoint import make_checkpoint
from shoal.runtime.tokenization.byte_tokenizer import write_byte_tokenizer
from shoal.runtime.types import GeneratedTokens, Request, SamplingParams
from tests.support.answers import Answers
from tests.support.invariance import bits
from tests.support.split import MemoryTransport, Published, Split, flip_a_byte

OTHER_MODEL = "KV cache fingerprint mismatch: the sender runs another model, dtype or kernel backend"


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """V3.2 whose sparse selection leaves tokens out in every prompt but the shortest."""
    path = tmp_path_factory.mktemp("model")
    overrides = {"vocab_size": 272, "index_topk": 8}
    make_checkpoint(path, "deepseek_v32", seed=37, dtype=request.param, overrides=overrides)
    write_byte_tokenizer(path / "tokenizer.json")
    return path


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_engine(
    model_dir: Path, transport: MemoryTransport | None, clock: Clock | None = None, **settings: Any
) -> Engine:
    defaults: dict[str, Any] = {"num_kv_blocks": 64, "max_model_len": 96, "max_num_seqs": 8, "block_size": 8}
    config = EngineConfig(**{**defaults, **settings})
    return build_engine(model_dir, config, single_process_groups(), transport=transport, clock=clock or Clock())


def make_split(
    model_dir: Path,
    *,
    prefill: dict[str, Any] | None = None,
    decode: dict[str, Any] | None = None,
    delay: int = 0,
    spoil: Callable[[KVChunk, Tensor], Tensor | None] = lambda chunk, payload: payload,
    clock: Clock | None = None,
) -> tuple[Split, Published, MemoryTransport]:
    published: Published = {}
    receiver = MemoryTransport(1, published, delay, spoil)
    source = make_engine(model_dir, MemoryTransport(0, published), clock, **(prefill or {}))
    target = make_engine(model_dir, receiver, clock, **{"block_size": 4, "num_kv_blocks": 128, **(decode or {})})
    return Split(source, target), published, receiver


def requests() -> list[Request]:
    """Prompts from one token to several blocks; two with the same beginning; every kind of sampling state."""

    def ask(name: str, prompt: range, **params: Any) -> Request:
        settings = SamplingParams(**{"max_tokens": 10, "logprobs": 1, **params})
        return Request(request_id=name, prompt_token_ids=tuple(prompt), params=settings)

    return [
        ask("greedy", range(3, 40), temperature=0.0, logprobs=3, ignore_eos=True),
        ask("one token", range(90, 91), temperature=0.0),
        ask("several", range(40, 73), temperature=1.5, seed=7, n=3, stop_token_ids=list(range(3, 60))),
        ask("penalties", range(90, 106), temperature=0.9, seed=8, repetition_penalty=1.3, min_tokens=6),
        ask("same beginning", range(3, 44), temperature=1.2, seed=9, stop=["never met", "x"]),
        ask("scored", range(170, 199), temperature=0.7, seed=10, n=2, prompt_logprobs=2, logit_bias={5: 4.0}),
        ask("first is last", range(200, 219), temperature=0.0, max_tokens=1),
    ]


def expected(model_dir: Path, asked: list[Request], **settings: Any) -> dict[str, tuple[Any, ...]]:
    """What one engine answers."""
    engine = make_engine(model_dir, None, **settings)
    answers = Answers(asked)
    for one in asked:
        engine.add_request(one)
    while engine.has_unfinished:
        answers.take(engine.step().outputs)
    return {name: bits(output) for name, output in answers.finished.items()}


@pytest.mark.parametrize(
    ("prefill", "decode", "delay"),
    [
        ({}, {}, 0),
        ({"block_size": 4, "max_chunk_size": 5}, {"block_size": 16, "num_kv_blocks": 32}, 3),
        ({"max_num_batched_tokens": 7}, {"max_num_batched_tokens": 9, "max_num_seqs": 2}, 1),
        ({"enable_prefix_caching": False}, {"enable_prefix_caching": False}, 0),
        ({"kv_buffer_size": 1}, {}, 2),
        ({"max_num_batched_tokens": 16, "num_kv_blocks": 12}, {"num_kv_blocks": 24}, 2),
    ],
    ids=["plain", "chunks, unequal blocks", "small steps", "no prefix cache", "one export at a time", "few blocks"],
)
def test_the_same_bits_as_one_engine(
    model_dir: Path, prefill: dict[str, Any], decode: dict[str, Any], delay: int
) -> None:
    split, published, _ = make_split(model_dir, prefill=prefill, decode=decode, delay=delay)
    outputs = split.run(requests())
    assert {i: bits(o) for i, o in outputs.items()} == expected(model_dir, requests())
    assert not published, "entries that nobody will read"
    assert all(one.error is None for one in split.loaded), split.loaded
    assert len(split.loaded) == len(requests()) - 1, "the one that ends with its first token needs no decode"
    assert split.prefill.scheduler.transfer_buffer.num_tokens == 0


def test_fp8_entries_travel(model_dir: Path) -> None:
    settings = {"kv_cache_dtype": "fp8"}
    split, _, receiver = make_split(model_dir, prefill=settings, decode=settings)
    outputs = split.run(requests())
    assert {i: bits(o) for i, o in outputs.items()} == expected(model_dir, requests(), **settings)
    assert expected(model_dir, requests(), **settings) != expected(model_dir, requests())
    assert all(one.error is None for one in split.loaded), split.loaded
    config = split.decode.runner.model.config
    latent, rope = config.kv_lora_rank + 4, 2 * config.qk_rope_head_dim  # one scale: at most 128 columns
    per_token = config.num_hidden_layers * (latent + rope + config.index_head_dim + 4)
    assert {c.num_bytes for c in receiver.fetched} == {per_token * (c.end - c.start) for c in receiver.fetched}


@pytest.mark.parametrize("formats", [("auto", "fp8"), ("fp8", "auto")])
def test_entries_in_another_format_are_refused(model_dir: Path, formats: tuple[str, str]) -> None:
    source, target = ({"kv_cache_dtype": name} for name in formats)
    split, _, receiver = make_split(model_dir, prefill=source, decode=target)
    outputs = split.run(requests()[:1])
    assert split.loaded[0].error == OTHER_MODEL
    assert not receiver.fetched
    (_, tokens, *_), *_ = bits(outputs["greedy"])
    assert len(tokens) == 10


def test_chunks_travel_while_the_prompt_is_computed(model_dir: Path) -> None:
    split, _, receiver = make_split(model_dir, prefill={"max_chunk_size": 8})
    split.submit(requests()[0])
    for _ in range(3):
        split.step_prefill()
        split.step_decode()
        split.step_decode()
    assert not split.prefilled, "37 tokens take five steps"
    assert [(c.start, c.end) for c in receiver.fetched] == [(0, 8), (8, 16), (16, 24)]
    assert split.decode.scheduler.running[0].num_computed_tokens == 24


def test_what_the_decode_side_has_is_not_read_again(model_dir: Path) -> None:
    split, _, receiver = make_split(model_dir, prefill={"max_chunk_size": 8, "enable_prefix_caching": False})
    first, same = requests()[0], requests()[4]
    split.run([first])
    receiver.fetched.clear()
    split.run([same])
    # 36 common tokens fill nine blocks of the decode side; the chunks that end in them are not needed.
    assert [(c.start, c.end) for c in receiver.fetched] == [(32, 40), (40, 41)]
    assert {i: bits(o) for i, o in split.finished.items()} == expected(model_dir, [first, same])


def test_both_sides_count_the_bytes(model_dir: Path) -> None:
    split, _, _ = make_split(model_dir, prefill={"max_chunk_size": 8, "enable_prefix_caching": False})
    split.run([requests()[0]])
    split.run([requests()[4]])
    per_token = split.decode.runner.cache.bytes_per_token
    # prompts of 37 and 41 tokens, of the second of which the decode side reads the last two chunks, of 8 and 1
    assert split.prefill.stats().num_transferred_bytes == (37 + 41) * per_token
    assert split.decode.stats().num_transferred_bytes == (37 + 9) * per_token


def test_a_resumed_request_goes_on_after_what_it_had(model_dir: Path) -> None:
    asked = [r for r in requests() if r.params.max_tokens != 1]
    reference = make_engine(model_dir, None)
    answers = Answers(asked)
    for one in asked:
        reference.add_request(one)
    for _ in range(5):
        answers.take([*reference.step().outputs, *reference.take_outputs()])
    split, published, _ = make_split(model_dir)
    outputs = split.run([replace(r, generated=answers.responses[r.request_id].generated()) for r in asked])
    assert {i: bits(o) for i, o in outputs.items()} == expected(model_dir, asked)
    assert not published


@pytest.mark.parametrize("attempts", [1, 10**6], ids=["once", "always"])
def test_a_corrupt_chunk_is_read_again_or_its_prompt_computed_here(model_dir: Path, attempts: int) -> None:
    spoiled: dict[int, int] = {}

    def spoil(chunk: KVChunk, payload: Tensor) -> Tensor:
        spoiled[chunk.generation] = spoiled.get(chunk.generation, 0) + 1
        return flip_a_byte(chunk, payload) if spoiled[chunk.generation] <= attempts else payload

    split, published, _ = make_split(model_dir, prefill={"max_chunk_size": 16}, spoil=spoil)
    outputs = split.run(requests())
    assert {i: bits(o) for i, o in outputs.items()} == expected(model_dir, requests())
    assert [one.error is None for one in split.loaded] == [attempts == 1] * 6
    assert not published


def test_released_entries_are_computed_here(model_dir: Path) -> None:
    """As after a lease that ended, or a publisher that died."""
    split, published, _ = make_split(model_dir, delay=2)
    for request in requests():
        split.submit(request)
    for _ in range(3):
        split.step_prefill()
        published.clear()
    outputs = split.run([])
    assert {i: bits(o) for i, o in outputs.items()} == expected(model_dir, requests())
    assert all(one.error is not None and "released" in one.error for one in split.loaded)


@pytest.mark.parametrize("num_chunks", [0, 1, 3])
def test_a_prefill_that_fails_leaves_what_was_loaded(model_dir: Path, num_chunks: int) -> None:
    split, _, _ = make_split(model_dir, prefill={"max_chunk_size": 8})
    request = requests()[0]
    split.decode.add_request(replace(request, do_remote_prefill=True))
    split.begun.add(request.request_id)
    split.submit(request)
    for _ in range(num_chunks):
        split.step_prefill()
    split.step_decode()
    split.step_decode()
    split.step_decode()
    split.decode.end_prefill(request.id, None)
    answers = Answers([request])
    computed = 0
    while not answers.finished:
        answers.take(split.decode.step().outputs)
        computed += 1
    assert {name: bits(output) for name, output in answers.finished.items()} == expected(model_dir, [request])
    assert split.decode.scheduler.prefix_cache_hits == 0
    split.prefill.abort(request.id)
    assert split.prefill.scheduler.transfer_buffer.num_tokens == 0


@pytest.mark.parametrize("ends", ["the prefill failed", "no news"])
def test_a_resumed_request_without_entries_goes_on_after_what_it_had(model_dir: Path, ends: str) -> None:
    clock = Clock()
    split, _, _ = make_split(model_dir, clock=clock)
    request = requests()[0]
    request = replace(request, params=replace(request.params, logprobs=None))
    whole = expected(model_dir, [request])
    known = GeneratedTokens(whole["greedy"][0][1][:4])
    split.decode.add_request(replace(request, do_remote_prefill=True, generated=(known,)))
    split.decode.step()
    if ends == "no news":
        clock.now += TRANSFER_TIMEOUT_S + 1
    else:
        split.decode.end_prefill(request.id, None)
    answers = Answers([request])
    while not answers.finished:
        answers.take(split.decode.step().outputs)
    assert {name: bits(output) for name, output in answers.finished.items()} == whole


def test_no_news_for_too_long(model_dir: Path) -> None:
    clock = Clock()
    split, published, _ = make_split(model_dir, clock=clock, spoil=lambda chunk, payload: None)
    request = requests()[0]
    split.submit(request)
    split.step_prefill()
    for _ in range(3):
        split.step_decode()
    clock.now += TRANSFER_TIMEOUT_S + 1
    outputs = split.run([])
    assert bits(outputs["greedy"]) == expected(model_dir, [request])["greedy"]
    assert split.loaded[0].error is not None
    assert "no news" in split.loaded[0].error
    assert not published


def test_a_lease_ends(model_dir: Path) -> None:
    clock = Clock()
    split, published, _ = make_split(model_dir, clock=clock)
    split.submit(requests()[0])
    split.step_prefill()
    assert published
    clock.now += 10_000
    split.prefill.step()
    assert not published
    assert split.prefill.scheduler.transfer_buffer.num_tokens == 0


def test_aborted_in_every_state(model_dir: Path) -> None:
    """Blocks, chunks and room come back wherever a request is when its user loses interest."""
    for num_steps in range(8):
        split, published, _ = make_split(model_dir, prefill={"max_chunk_size": 8}, delay=1)
        split.submit(requests()[0])
        for _ in range(num_steps):
            split.step_prefill()
            split.step_decode()
        split.prefill.abort(RequestId("greedy"))
        split.decode.abort(RequestId("greedy"))
        for engine in (split.prefill, split.decode):
            assert not engine.has_unfinished
            assert not engine.scheduler.has_unfinished
            assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks
            engine.block_manager.check_integrity()
            assert engine.step().idle
        assert not published
        assert split.prefill.scheduler.transfer_buffer.num_tokens == 0


def test_preempted_while_it_loads(model_dir: Path) -> None:
    split, _, receiver = make_split(model_dir, prefill={"max_chunk_size": 8}, decode={"enable_prefix_caching": False})
    split.submit(requests()[0])
    for _ in range(4):
        split.step_prefill()
        split.step_decode()
    seq = split.decode.scheduler.running[0]
    assert seq.num_computed_tokens > 0
    split.decode.scheduler.preempt(seq.seq_id)
    outputs = split.run([])
    assert bits(outputs["greedy"]) == expected(model_dir, requests()[:1])["greedy"]
    assert split.loaded[0].error is None
    assert [c.start for c in receiver.fetched].count(0) == 2


def test_entries_of_another_model_are_refused(model_dir: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v32", seed=38, overrides={"vocab_size": 272, "index_topk": 8})
    write_byte_tokenizer(tmp_path / "tokenizer.json")
    published: Published = {}
    source = make_engine(tmp_path, MemoryTransport(0, published))
    target = make_engine(model_dir, MemoryTransport(1, published))
    split = Split(source, target)
    split.submit(requests()[0])
    split.step_prefill()
    split.step_decode()
    split.step_decode()
    assert split.loaded[0].error == OTHER_MODEL


def test_the_first_tokens_are_those_of_one_engine(model_dir: Path) -> None:
    split, _, _ = make_split(model_dir)
    asked = requests()
    split.run(asked)
    whole = expected(model_dir, asked)
    assert split.prefilled
    for request_id, first in split.prefilled.items():
        for index, tokens in enumerate(first):
            assert tokens.token_ids == whole[request_id][index][1][:1]
