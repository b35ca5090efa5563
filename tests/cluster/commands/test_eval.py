"""`shoal eval`: what counts as a right answer, the intervals, and the command on a real engine."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from shoal.cluster.bundled import TASKS, questions
from shoal.cluster.commands.cli import main
from shoal.cluster.commands.eval import final_answer, score, table, wilson_interval
from shoal.runtime.random_checkpoint import make_checkpoint
from shoal.runtime.types import CompletionOutput, FinishReason, RequestOutput

RECIPE = Path(__file__).parents[3] / "examples" / "tiny_model"


def answered(content: str | None, finish_reason: FinishReason = "stop") -> RequestOutput:
    message = {"role": "assistant", "reasoning_content": "4 + 38", "content": content}
    completion = CompletionOutput(index=0, text="", token_ids=[], finish_reason=finish_reason, message=message)
    return RequestOutput(request_id="0", prompt_token_ids=[], outputs=[completion], finished=True)


@pytest.mark.parametrize(("content", "answer"), [("42", "42"), ("\n42 ", "42"), (None, None)])
def test_the_answer_is_the_content(content: str | None, answer: str | None) -> None:
    assert final_answer(answered(content)) == answer


def test_an_answer_that_was_cut_off_is_none() -> None:
    assert final_answer(answered("42", "length")) is None


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    # by hand from the formula with z = 1.96
    [(8, 10, 0.49016, 0.94332), (0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (190, 200, 0.91044, 0.97262)],
)
def test_wilson_intervals(right: int, count: int, low: float, high: float) -> None:
    assert wilson_interval(right, count) == pytest.approx((low, high), abs=2e-5)


def test_the_table_has_a_line_per_task() -> None:
    scores = {"addition": {"thinking": score(8, 10), "direct": score(0, 10)}}
    assert table(scores).splitlines() == [
        "task               n  thinking                direct",
        "addition          10  0.800 (0.490-0.943)     0.000 (0.000-0.278)",
    ]


def test_every_task_has_200_different_questions() -> None:
    rows = questions()
    assert Counter(row.task for row in rows) == dict.fromkeys(TASKS, 200)
    assert len({row.question for row in rows}) == len(rows)
    assert [row.task for row in questions(["lookup", "addition"], limit=2)] == ["lookup"] * 2 + ["addition"] * 2


def test_the_questions_are_those_that_training_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RECIPE))
    import held_out  # type: ignore[import-not-found]
    import tasks  # type: ignore[import-not-found]

    try:
        lines = [json.loads(line) for line in held_out.lines()]
        keys = {task: {row.key for row in tasks.held_out_rows(task, 200)} for task in TASKS}
    finally:
        for name in ("held_out", "tasks"):
            sys.modules.pop(name)
    assert lines == [{"task": r.task, "question": r.question, "answer": r.answer} for r in questions()]
    assert all(tasks.is_held_out(key) for of_task in keys.values() for key in of_task)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_checkpoint(directory, "deepseek_v32", overrides={"vocab_size": 272})
    return directory


def test_the_command_writes_the_scores(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "scores.json"
    flags = ["--tasks", "addition,sorting", "--limit", "3", "--max-tokens", "4", "--output", str(path)]
    engine = ["--max-model-len", "128", "--num-kv-blocks", "16", "--num-threads-per-worker", "1"]
    result = CliRunner().invoke(main, ["eval", "--model", str(model), *flags, *engine])
    assert result.exit_code == 0, result.output
    scores: dict[str, Any] = json.loads(path.read_text())
    nothing = {"accuracy": 0.0, "low": 0.0, "high": 0.5615, "n": 3}
    assert scores == {task: {"thinking": nothing, "direct": nothing} for task in ("addition", "sorting")}
    assert result.stdout == table(scores) + "\n"
    assert "sorting, direct: 0 of 3 right" in result.stderr


def test_one_mode_only(model: Path, tmp_path: Path) -> None:
    flags = ["--tasks", "copying", "--thinking", "off", "--limit", "1", "--max-tokens", "2"]
    engine = ["--max-model-len", "128", "--num-kv-blocks", "16", "--num-threads-per-worker", "1"]
    result = CliRunner().invoke(main, ["eval", "--model", str(model), *flags, *engine])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == "task               n  direct"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "addition,chess"], "there is no task chess; known are addition, subtraction"),
        (["--output", "."], ". is a directory"),
        (["--limit", "0"], "limit must be a whole number of at least 1 or null, got 0"),
        (["--tasks", "lookup", "--max-model-len", "64"], "maximum context length is 64 tokens"),
    ],
)
def test_bad_arguments_are_usage_errors(model: Path, flags: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["eval", "--model", str(model), "--num-threads-per-worker", "1", *flags])
    assert result.exit_code == 2
    assert message in result.stderr
