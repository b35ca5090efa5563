"""Processors on a local Ray: files in and out, Ray's own examples, and engines that are killed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group_table

from shoal import LLM, SamplingParams
from shoal.cluster.bundled import BUNDLED_MODEL
from shoal.cluster.data.columns import ERROR_COLUMN, SCHEMA
from shoal.cluster.data.rows import row_seed
from shoal.cluster.workers.ray_cluster import connect
from shoal.data import EngineProcessorConfig, Processor, build_processor
from shoal.parallel.failpoints import VARIABLE
from tests.support.processes import actor_pids

pytestmark = [pytest.mark.ray, pytest.mark.slow]
DEADLINE_S = 600.0
NUM_CPUS = 5
"""An engine's actor, two workers, and tasks that read and write rows."""
ENGINE: dict[str, Any] = {"max_num_seqs": 16, "num_threads_per_worker": 1}


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    import ray.data

    cluster = connect(None, num_cpus=NUM_CPUS)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    yield
    cluster.close()


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(**ENGINE) as llm:
        yield llm


def processor(engine_kwargs: dict[str, Any] | None = None, **values: Any) -> Processor:
    functions = {name: values.pop(name) for name in ("preprocess", "postprocess") if name in values}
    kwargs = ENGINE | (engine_kwargs or {})
    config = EngineProcessorConfig(model_source=str(BUNDLED_MODEL), engine_kwargs=kwargs, **values)
    return build_processor(config, **functions)


def expected(llm: LLM, rows: list[dict[str, Any]], **sampling: Any) -> list[list[int]]:
    """What `LLM` answers to the rows: to their messages, or else to their token ids."""
    params = [SamplingParams(seed=row_seed(0, row["prompt_token_ids"]), **sampling) for row in rows]
    if "messages" in rows[0]:
        outputs = llm.chat([row["messages"] for row in rows], params)
    else:
        outputs = llm.generate([row["prompt_token_ids"] for row in rows], params)
    return [output.outputs[0].token_ids for output in outputs]


def tokens(rows: list[dict[str, Any]]) -> list[list[int]]:
    return [row["generated_tokens"] for row in rows]


def wait_until(is_done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not is_done():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@contextmanager
def watched(title: str) -> Iterator[set[int]]:
    """All actors with this title that run at some time during the block, which ends when none is left."""
    seen: set[int] = set()
    left = threading.Event()

    def look() -> None:
        while not left.wait(0.1):
            seen.update(actor_pids(title, os.getpid()))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        left.set()
        thread.join()
    wait_until(lambda: not actor_pids(title, os.getpid()))


def test_jsonl_to_parquet_with_failed_rows(tmp_path: Path, llm: LLM) -> None:
    lines = [{"id": i, "question": f"What is {i} + {i + 20}?" if i % 4 else ""} for i in range(24)]
    lines += [{"id": i, "question": ""} for i in range(24, 32)]
    for part in range(4):  # all rows of the last file fail
        own = lines[8 * part : 8 * part + 8]
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in own))
    sampling = {"temperature": 0.8, "max_tokens": 8}
    run = processor(
        batch_size=4,
        should_continue_on_error=True,
        preprocess=lambda row: {
            "messages": [{"role": "user", "content": row["question"]}] if row["question"] else [],
            "sampling_params": sampling,
        },
        postprocess=lambda row: {**row, "answer": row["generated_text"].strip()},
    )
    run(ray.data.read_json([str(path) for path in sorted(tmp_path.glob("*.jsonl"))])).write_parquet(
        str(tmp_path / "out")
    )
    import pyarrow.parquet as pq

    for path in (tmp_path / "out").iterdir():
        schema = pq.read_schema(path)
        for field in SCHEMA:
            if "logprobs" not in field.name:  # nobody asked for them
                assert schema.field(field.name).type.equals(field.type), f"{path}: {field}"
    rows = sorted(ray.data.read_parquet(str(tmp_path / "out")).take_all(), key=lambda row: row["id"])
    assert [row["id"] for row in rows] == list(range(32))
    good = [row for row in rows if row["question"]]
    assert tokens(good) == expected(llm, good, **sampling)
    assert all((row[ERROR_COLUMN], row["answer"]) == ("", row["generated_text"].strip()) for row in good)
    for row in rows:
        assert row["batch_uuid"]
        if not row["question"]:
            assert row[ERROR_COLUMN].startswith("empty_prompt: ")
            assert (row.get("answer"), row["generated_tokens"], row["generated_text"]) == (None, [], "")


def nothing_is_reserved() -> bool:
    return all(group["state"] == "REMOVED" for group in placement_group_table().values())


@pytest.mark.parametrize(
    ("layout", "max_tokens"), [({}, 250), ({"data_parallel_size": 2}, 80)], ids=["in its actor", "in workers"]
)
def test_a_killed_engine_costs_no_row(layout: dict[str, Any], max_tokens: int, tmp_path: Path, llm: LLM) -> None:
    prompts = [{"id": i, "tokenized_prompt": [0, *range(20, 26 + i % 7), 30 + i]} for i in range(32)]
    ray.data.from_items(prompts).write_parquet(str(tmp_path / "in"))
    sampling = {"temperature": 1.0, "max_tokens": max_tokens, "ignore_eos": True}
    run = processor(
        layout,
        batch_size=4,
        max_concurrent_batches=2,
        chat_template_stage=False,
        preprocess=lambda row: {"sampling_params": sampling},
        postprocess=lambda row: {name: row[name] for name in ("id", "prompt_token_ids", "generated_tokens")},
    )
    dataset = run(ray.data.read_parquet(str(tmp_path / "in")).repartition(8))
    rows: list[dict[str, Any]] = []
    with watched("MapWorker") as engines:
        for row in dataset.iter_rows():
            if not rows:
                (pid,) = actor_pids("MapWorker", os.getpid())
                os.kill(pid, signal.SIGKILL)
            rows.append(row)
    assert len(engines) == 2, "the second one answered the rest"
    rows.sort(key=lambda row: row["id"])
    assert [row["id"] for row in rows] == list(range(32))
    assert [row["prompt_token_ids"] for row in rows] == [prompt["tokenized_prompt"] for prompt in prompts]
    assert tokens(rows) == expected(llm, rows, **sampling)
    wait_until(nothing_is_reserved)


def test_a_killed_worker_costs_no_row(llm: LLM) -> None:
    sampling = {"temperature": 1.0, "max_tokens": 100, "ignore_eos": True, "logprobs": 1}
    run = processor(
        {"data_parallel_size": 2},
        batch_size=4,
        preprocess=lambda row: {"prompt": f"{row['id']} + 17 =", "sampling_params": sampling},
        runtime_env={"env_vars": {VARIABLE: "mixed:1:engine.run:40"}},
    )
    with watched("MapWorker") as engines, watched("Worker") as workers:
        rows = run(ray.data.range(24, override_num_blocks=6)).take_all()
    assert (len(engines), len(workers)) == (1, 3), "one worker took the place of the killed one"
    assert sorted(row["id"] for row in rows) == list(range(24))
    assert tokens(rows) == expected(llm, rows, **sampling)
    wait_until(nothing_is_reserved)
    for row in rows:
        assert row["prompt"] == f"{row['id']} + 17 ="
        for token, position in zip(row["generated_tokens"], row["logprobs"], strict=True):
            assert position[token]["logprob"] <= 0


def test_a_failed_row_ends_the_dataset_unless_it_may_continue() -> None:
    run = processor(preprocess=lambda row: {"prompt": "a" * row["id"]})
    with pytest.raises(Exception, match=r"a row cannot be answered: empty_prompt"):
        run(ray.data.range(3)).materialize()


def examples() -> list[str]:
    """Code of the examples in the documentation of Ray's `build_processor`."""
    spec = importlib.util.find_spec("ray.data.llm")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text()
    blocks = re.findall(
        r"\.\. testcode::\n\s+:skipif: True\n\n(.*?)(?=\n {0,8}\S)",
        source[source.rindex("def build_processor") :],
        re.S,
    )
    return [textwrap.dedent(block) for block in blocks]


def run_example(code: str) -> list[dict[str, Any]]:
    """Run it with one import changed, and our model; returns the rows that it prints."""
    code = code.replace("from ray.data.llm import", "from shoal.data import")
    code = re.sub(r'model_source="[^"]*"', f"model_source={str(BUNDLED_MODEL)!r}", code)
    printed: list[dict[str, Any]] = []
    exec(code, {"__name__": "__main__", "print": printed.append})
    return printed


def test_the_example_of_ray_with_one_import_changed(llm: LLM) -> None:
    rows = run_example(examples()[0])
    assert sorted(row["id"] for row in rows) == list(range(300))
    for row in rows:
        assert row["resp"] == row["generated_text"]
        assert row["messages"][0]["content"] == "You are a calculator"
    assert tokens(rows) == expected(llm, rows, temperature=0.3, max_tokens=20)


def test_the_example_of_ray_with_thinking(llm: LLM) -> None:
    (code,) = [example for example in examples() if "enable_thinking" in example]
    (row,) = run_example(code)
    (output,) = llm.chat(
        row["messages"],
        SamplingParams(temperature=0.6, max_tokens=100, seed=row_seed(0, row["prompt_token_ids"])),
        thinking=True,
    )
    assert row["generated_tokens"] == output.outputs[0].token_ids
