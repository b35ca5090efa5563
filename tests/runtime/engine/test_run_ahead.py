"""Steps that are started before the one before them is finished, and a sampler that only hands out tokens late.

On a GPU both save time; here they run on a CPU, where nothing but the answers is to be seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.parallel.groups import single_process_groups
from shoal.parallel.request_id import RequestId
from shoal.runtime.engine.build import build_engine
from shoal.runtime.engine.config import EngineConfig
from shoal.runtime.engine.engine import Engine
from shoal.runtime.random_checkpoint import make_checkpoint
from shoal.runtime.sampling.device_sampler import DeviceSampler
from shoal.runtime.sampling.sampler import Sampler, SamplingRow
from shoal.runtime.types import Request, RequestOutput, SamplingParams
from tests.support.answers import Answers
from tests.support.invariance import bits
from tests.support.ops import CPU_OPS

CPU = torch.device("cpu")
VOCAB = 300


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_checkpoint(path, "deepseek_v32", seed=21, dtype=torch.float32, overrides={"vocab_size": VOCAB})
    return path


def make_engine(model_dir: Path, *, ahead: bool, **config: Any) -> Engine:
    defaults: dict[str, Any] = {"block_size": 4, "num_kv_blocks": 64, "max_model_len": 64, "max_num_seqs": 4}
    engine = build_engine(model_dir, EngineConfig(**{**defaults, **config}), single_process_groups())
    engine.sampler = DeviceSampler(VOCAB, CPU, CPU_OPS)
    engine.overlap = ahead
    return engine


def requests() -> list[Request]:
    """Lengths of prompts and answers that differ; two rows that the host samples; one that meets its stop token."""
    params: list[dict[str, Any]] = [
        {"temperature": 0.0, "max_tokens": 9},
        {"temperature": 1.0, "max_tokens": 14, "logprobs": 2},
        {"temperature": 0.8, "top_p": 0.9, "max_tokens": 6},
        {"temperature": 0.0, "max_tokens": 12, "frequency_penalty": 0.5},
        {"temperature": 1.0, "max_tokens": 11, "n": 2, "stop_token_ids": list(range(3, VOCAB, 9))},
        {"temperature": 0.0, "max_tokens": 1, "logprobs": 0},
        {"temperature": 1.0, "top_k": 4, "min_tokens": 3, "max_tokens": 8},
    ]
    prompts = [tuple(3 + (7 * i + 5 * j) % 250 for j in range(1 + 5 * i % 13)) for i in range(len(params))]
    return [
        Request(request_id=str(i), index=i, prompt_token_ids=prompt, params=SamplingParams(**p))
        for i, (prompt, p) in enumerate(zip(prompts, params, strict=True))
    ]


def run(
    engine: Engine, arrivals: dict[int, list[Request]], aborts: dict[int, str], preempt_every: int = 0
) -> dict[str, RequestOutput]:
    """Requests come before the steps that they are listed under, and are aborted likewise; some lose their blocks."""
    answers = Answers(request for requests in arrivals.values() for request in requests)
    step = 0
    while engine.has_unfinished or step <= max(arrivals):
        for request in arrivals.get(step, []):
            engine.add_request(request)
        if step in aborts:
            engine.abort(RequestId(aborts[step]))
        if preempt_every and step % preempt_every == preempt_every - 1 and (running := engine.scheduler.running):
            engine.scheduler.preempt(running[step % len(running)].seq_id)
        answers.take(engine.step().outputs)
        engine.block_manager.check_integrity()
        step += 1
        assert step < 1000
    assert engine.audit() == []
    return answers.finished


@settings(max_examples=12, deadline=None)
@given(
    arrival=st.lists(st.integers(0, 12), min_size=7, max_size=7),
    aborts=st.dictionaries(st.integers(1, 14), st.sampled_from("01246"), max_size=2),
    num_kv_blocks=st.sampled_from([16, 64]),
    preempt_every=st.sampled_from([0, 3, 4]),
)
def test_running_ahead_changes_no_answer(
    model_dir: Path, arrival: list[int], aborts: dict[int, str], num_kv_blocks: int, preempt_every: int
) -> None:
    """16 blocks are too few for all, so that sequences are preempted for that too."""
    arrivals: dict[int, list[Request]] = {}
    for request, step in zip(requests(), arrival, strict=True):
        arrivals.setdefault(step, []).append(request)
    expected = run(make_engine(model_dir, ahead=False), {0: requests()}, {})
    found = run(make_engine(model_dir, ahead=True, num_kv_blocks=num_kv_blocks), arrivals, aborts, preempt_every)
    assert set(found) >= set(expected) - set(aborts.values())
    for request_id, output in found.items():
        assert bits(output) == bits(expected[request_id])


def test_the_next_step_is_started_before_the_tokens_are_read(model_dir: Path) -> None:
    engine = make_engine(model_dir, ahead=True)
    events: list[str] = []
    run_ahead, finish = engine.runner.run_ahead, DeviceSampler._finish

    def ahead(*args: Any) -> torch.Tensor:
        events.append("run")
        logits: torch.Tensor = run_ahead(*args)
        return logits

    def finishing(self: DeviceSampler, *args: Any) -> Any:
        events.append("read")
        return finish(self, *args)

    engine.runner.run_ahead = ahead  # type: ignore[method-assign, assignment]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceSampler, "_finish", finishing)
        run(engine, {0: requests()[:1]}, {})
    # 9 tokens: the first step computes the prompt, and nothing follows the last one
    assert events == ["run", "read"] * 8 + ["read"]


def test_rows_that_need_the_host_are_not_run_ahead_of(model_dir: Path) -> None:
    engine = make_engine(model_dir, ahead=True)
    engine.runner.run_ahead = None  # type: ignore[method-assign, assignment]
    penalised = [r for r in requests() if r.params.frequency_penalty]
    assert len(run(engine, {0: penalised}, {})) == 1


def test_rows_that_must_have_a_form_are_not_run_ahead_of(model_dir: Path) -> None:
    """The mask of a token needs the token before it. Rows beside it wait with it, and have the same answers."""
    form = {"structured_outputs": {"regex": "[a-d]{8}"}, "max_tokens": 20, "temperature": 1.0}
    constrained = Request(
        request_id="form", index=9, prompt_token_ids=(5, 6), params=SamplingParams.from_dict({**form, "seed": 3})
    )
    engine = make_engine(model_dir, ahead=True)
    run_ahead = engine.runner.run_ahead
    engine.runner.run_ahead = None  # type: ignore[method-assign, assignment]
    alone = run(engine, {0: [constrained]}, {})["form"]
    assert len(alone.outputs[0].text) == 8
    assert set(alone.outputs[0].text) <= set("abcd")
    engine.runner.run_ahead = run_ahead  # type: ignore[method-assign]
    together = run(engine, {0: [*requests(), constrained]}, {}, preempt_every=3)
    expected = run(make_engine(model_dir, ahead=False), {0: requests()}, {})
    assert bits(together.pop("form")) == bits(alone)
    assert {name: bits(output) for name, output in together.items()} == {
        name: bits(output) for name, output in expected.items()
    }


def test_a_device_chooses_what_the_host_would() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(40, VOCAB, generator=generator) * 3
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0, "logprobs": 5},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 12, "logprobs": 0},
        {"temperature": 1.3, "top_p": 0.8, "logprobs": 3},
        {"temperature": 1.0, "min_p": 0.1, "top_p": 0.95, "top_k": 50},
        {"temperature": 1.0, "presence_penalty": 1.0, "logprobs": 1},
        {"temperature": 0.0, "logit_bias": {7: 50.0}},
        {"temperature": 1.0, "min_tokens": 4, "stop_token_ids": (3, 4)},
    ]
    rows = [
        SamplingRow(
            params=SamplingParams(**kinds[i % len(kinds)]),
            prompt_token_ids=(1, 2),
            output_token_ids=(5, 6, 7)[: i % 4],
            seed=1000 + i,
        )
        for i in range(len(logits))
    ]
    sampling = DeviceSampler(VOCAB, CPU, CPU_OPS).begin(logits, rows)
    assert sampling.token_ids is None
    for ours, host in zip(sampling.finish(), Sampler(VOCAB).sample(logits, rows), strict=True):
        assert ours.token_id == host.token_id
        assert (ours.logprobs is None) == (host.logprobs is None)
        for token, entry in (host.logprobs or {}).items():
            assert ours.logprobs is not None
            assert ours.logprobs[token].logprob == pytest.approx(entry.logprob, abs=1e-5)
            assert ours.logprobs[token].rank == entry.rank


def test_a_device_says_which_rows_are_broken() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[1, 5] = torch.nan
    params = SamplingParams(temperature=1.0, logprobs=1)
    rows = [SamplingRow(params=params, prompt_token_ids=(1,), output_token_ids=(), seed=i) for i in range(3)]
    sampling = DeviceSampler(VOCAB, CPU, CPU_OPS).begin(logits, rows)
    assert sampling.token_ids is not None
    first, broken, third = sampling.finish()
    assert first.error is third.error is None
    assert broken.token_id == -1
    assert broken.error is not None
    assert "NaN" in broken.error
