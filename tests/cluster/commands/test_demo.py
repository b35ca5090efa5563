"""The demo on a local Ray, once; its comparison must see every kind of difference."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from shoal.cluster.commands.arguments import DemoArgs
from shoal.cluster.commands.cli import main
from shoal.cluster.commands.demo import compare, demo, demo_rows, judge, questions_and_answers, shortened

pytestmark = pytest.mark.ray

Row = dict[str, Any]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """Directory, exit status and standard output of a whole run."""
    directory = tmp_path_factory.mktemp("demo") / "out"
    stdout = io.StringIO()
    threads = torch.get_num_threads()
    status = demo(DemoArgs(output=str(directory)), stdout=stdout, stderr=io.StringIO())
    torch.set_num_threads(threads)
    return directory, status, stdout.getvalue()


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_demo_finds_no_difference(shown: tuple[Path, int, str]) -> None:
    directory, status, text = shown
    assert status == 0, text
    answers, reference = (read(directory / name / "part-00000.jsonl") for name in ("answers", "reference"))
    # A line holds texts, token ids and logprobs; only the order of the lines may differ.
    assert sorted(answers, key=lambda row: row["id"]) == sorted(reference, key=lambda row: row["id"])
    token_ids = [choice["token_ids"] for row in answers for choice in row["response"]["body"]["choices"]]
    assert len(token_ids) == 14  # one row asks for two continuations
    num_tokens = sum(map(len, token_ids))
    assert text.splitlines()[-1] == (f"compared 13 rows, {num_tokens} tokens: 0 differing tokens, 0 differing logprobs")
    assert num_tokens > 200
    runs = [json.loads((directory / name / "run.json").read_text()) for name in ("answers", "reference")]
    assert [run["layout"]["tensor_parallel_size"] for run in runs] == [2, 1]
    assert text.count(runs[0]["digest"]) == 2
    assert sum(line.startswith("   ") and line.endswith(" s") for line in text.splitlines()) == 3


def test_the_demo_shows_questions_and_right_answers(shown: tuple[Path, int, str]) -> None:
    directory, _, text = shown
    rows = list(questions_and_answers(directory / "prompts.jsonl", directory / "answers"))
    assert len(rows) == len(demo_rows()) == 13
    answers = {(asked, bool(thinking)): answer for asked, thinking, answer in rows}
    assert answers["What is 4821 + 7790?", True] == "12611"
    assert answers["What is 90210 - 1876?", True] == "88334"
    assert answers["What is the sum of 9 8 7 6 5 4?", True] == "39"
    assert answers["Sort these digits: 7 1 9 4 4 0 2", False] == "0 1 2 4 4 7 9"
    assert answers["Reverse this: shoaloffish", False] == "hsiffolaohs"
    assert ("What is 4821 + 7790?", False) in answers
    (document,) = {asked for asked, _ in answers if asked.startswith("aa11 bh48")}
    assert document.endswith("\nWhat is mg?")
    assert answers[document, True] == "55"
    (second,) = {asked for asked, _ in answers if asked.startswith("What is ") and len(asked) == len("What is mg?")}
    assert f" {second[8:10]}{answers[second, True]} " in document, "the second question of a conversation"
    assert "   What is 4821 + 7790? " in text
    assert text.isascii()


def test_the_demo_finds_no_difference_when_a_worker_is_killed(tmp_path: Path) -> None:
    stdout, stderr = io.StringIO(), io.StringIO()
    threads = torch.get_num_threads()
    settings = DemoArgs(output=str(tmp_path / "out"), kill="decode:0")
    assert demo(settings, stdout=stdout, stderr=stderr) == 0
    torch.set_num_threads(threads)
    (fault,) = json.loads((tmp_path / "out" / "answers" / "faults.json").read_text())["faults"]
    assert (fault["worker"], fault["point"]) == ("decode:0", "engine.run")
    assert "lost decode:0 (its connection ended), noticed after" in stdout.getvalue()
    assert "lost decode:0: its connection ended" in stderr.getvalue(), "it is told when it happens"
    runs = [json.loads((tmp_path / "out" / name / "run.json").read_text()) for name in ("answers", "reference")]
    assert runs[0]["digest"] == runs[1]["digest"]
    assert [(r["role"], r["count"]) for r in runs[0]["layout"]["replicas"]] == [("prefill", 1), ("decode", 1)]


def change_token(rows: list[Row]) -> None:
    rows[2]["response"]["body"]["choices"][0]["token_ids"][1] += 1


def change_chat_logprob(rows: list[Row]) -> None:
    entries = next(c["logprobs"]["content"] for c in choices(rows) if "content" in c["logprobs"])
    entries[0]["logprob"] = math.nextafter(entries[0]["logprob"], 0.0)


def change_completion_logprob(rows: list[Row]) -> None:
    values = next(c["logprobs"]["token_logprobs"] for c in choices(rows) if "content" not in c["logprobs"])
    values[0] = math.nextafter(values[0], 0.0)


def drop_last_token(rows: list[Row]) -> None:
    rows[0]["response"]["body"]["choices"][0]["token_ids"].pop()


def choices(rows: list[Row]) -> list[Row]:
    return [choice for row in rows for choice in row["response"]["body"]["choices"]]


@pytest.mark.parametrize(
    ("tamper", "tokens", "logprobs"),
    [
        (change_token, 1, 0),
        (change_chat_logprob, 0, 1),
        (change_completion_logprob, 0, 1),
        (drop_last_token, 1, 0),
    ],
)
def test_a_tampered_answer_is_a_difference(
    shown: tuple[Path, int, str], tmp_path: Path, tamper: Callable[[list[Row]], None], tokens: int, logprobs: int
) -> None:
    tampered = copy(shown[0], tmp_path, tamper)
    stdout = io.StringIO()
    assert judge(tampered, shown[0] / "reference", stdout) == 1
    assert f"tokens: {tokens} differing tokens, {logprobs} differing logprobs" in stdout.getvalue()
    assert judge(shown[0] / "answers", shown[0] / "reference", stdout) == 0


def test_a_missing_row_is_a_difference(shown: tuple[Path, int, str], tmp_path: Path) -> None:
    missing = choices(read(shown[0] / "answers" / "part-00000.jsonl")[-1:])
    count = sum(len(choice["token_ids"]) for choice in missing)
    comparison = compare(copy(shown[0], tmp_path, lambda rows: rows.pop()), shown[0] / "reference")
    assert comparison.num_rows == 13
    assert (comparison.num_differing_tokens, comparison.num_differing_logprobs) == (count, count)


def test_another_digest_is_a_difference(shown: tuple[Path, int, str], tmp_path: Path) -> None:
    same = copy(shown[0], tmp_path, lambda rows: None)
    run = json.loads((same / "run.json").read_text())
    (same / "run.json").write_text(json.dumps(run | {"digest": "sha256:0"}))
    stdout = io.StringIO()
    assert judge(same, shown[0] / "reference", stdout) == 1
    assert stdout.getvalue().startswith("the output digests differ\ncompared 13 rows")


def copy(directory: Path, to: Path, tamper: Callable[[list[Row]], object]) -> Path:
    """A copy of the answers with some of them changed."""
    shutil.copytree(directory / "answers", to / "answers")
    part = to / "answers" / "part-00000.jsonl"
    rows = read(part)
    tamper(rows)
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return to / "answers"


def test_a_layout_that_does_not_divide_the_model_is_a_usage_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["demo", "--output", str(tmp_path / "out"), "-tp", "3"])
    assert result.exit_code == 2
    assert "tensor_parallel_size" in result.stderr


def test_only_printable_characters_are_shown() -> None:
    assert shortened("a\nb\u4e16\x1b[0m", 20) == "a.b..[0m"
    assert shortened("abcdefgh", 7) == "abcd..."
    assert shortened("abcdefg", 7) == "abcdefg"
