from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from shoal.cluster.jobs.input.bad_row import Place
from shoal.cluster.jobs.output import BatchOutput
from shoal.cluster.jobs.row_output import FinishedRow, failed_row
from shoal.cluster.openai.errors import ApiError
from shoal.parallel.request_id import RequestId
from shoal.runtime.types import GeneratedTokens, Logprob, Tokens

NUM_ROWS = 12


def row(index: int) -> FinishedRow:
    """Row 5k is a failed one; the line's length differs from row to row."""
    data = json.dumps({"id": index, "text": "x" * (index * 7 % 11)}).encode() + b"\n"
    digest = hashlib.sha256(data).digest()
    return FinishedRow(
        index=index, failed=index % 5 == 0, data=data, digest=digest, num_prompt_tokens=index, num_output_tokens=1
    )


def expected_digest(num_rows: int) -> str:
    return "sha256:" + hashlib.sha256(b"".join(row(i).digest for i in range(num_rows))).hexdigest()


def tokens(index: int, start: int, end: int) -> GeneratedTokens:
    """Tokens of continuation 1 of a row; odd rows have logprobs."""
    ids = tuple(100 * index + i for i in range(start, end))
    return GeneratedTokens(ids, tuple({t: Logprob(-t / 7, 1)} for t in ids) if index % 2 else None)


def progress(index: int, start: int, end: int) -> Tokens:
    new = tokens(index, start, end)
    return Tokens(
        id=RequestId(f"row-{index}"), sample_index=1, start=start, token_ids=new.token_ids, logprobs=new.logprobs
    )


def open_output(directory: Path, commit_rows: int = 1024) -> BatchOutput:
    output = BatchOutput(directory, clock=lambda: 0.0, commit_rows=commit_rows)
    output.save_run(state="in_progress")
    return output


def read(directory: Path, name: str) -> bytes:
    return (directory / name).read_bytes()


def test_rows_go_to_two_files_and_one_digest(tmp_path: Path) -> None:
    output = open_output(tmp_path)
    for index in (3, 0, 2, 1, 5, 4):
        output.add(row(index))
    assert not output.is_finished(3), "a row counts only when it is durable"
    output.commit()
    assert [output.is_finished(i) for i in range(7)] == [True] * 6 + [False]
    assert read(tmp_path, "part-00000.jsonl") == b"".join(row(i).data for i in (3, 2, 1, 4))
    assert read(tmp_path, "errors.jsonl") == b"".join(row(i).data for i in (0, 5))
    assert output.digest(6) == expected_digest(6)
    counts = output.counts
    assert (counts.completed, counts.failed, counts.num_prompt_tokens, counts.num_output_tokens) == (4, 2, 15, 6)
    output.close()


def test_groups_are_committed_by_number_by_bytes_and_by_time(tmp_path: Path) -> None:
    now = 0.0
    output = BatchOutput(tmp_path, commit_rows=3, commit_bytes=1000, commit_interval_s=0.2, clock=lambda: now)
    output.save_run(state="in_progress")
    output.add(row(1))
    output.add(row(2))
    output.commit_if_due()
    assert output.counts.finished == 0
    output.add(row(3))
    assert output.counts.finished == 3
    output.add(row(4))
    now = 0.19
    output.commit_if_due()
    assert output.counts.finished == 3
    now = 0.2
    output.commit_if_due()
    assert output.counts.finished == 4
    output.add(FinishedRow(index=6, failed=False, data=b"x" * 999 + b"\n", digest=bytes(32)))
    assert output.counts.finished == 5
    output.close()


def test_lines_without_a_record_are_cut_off(tmp_path: Path) -> None:
    output = open_output(tmp_path)
    output.add(row(1))
    output.commit()
    output.close()
    with (tmp_path / "part-00000.jsonl").open("ab") as file:
        file.write(row(2).data + b'{"half')
    output = open_output(tmp_path)
    assert (output.is_finished(1), output.is_finished(2)) == (True, False)
    output.close()
    assert read(tmp_path, "part-00000.jsonl") == row(1).data


def test_tokens_of_unfinished_rows_are_there_after_a_crash(tmp_path: Path) -> None:
    now = 0.0
    output = BatchOutput(tmp_path, commit_interval_s=0.2, clock=lambda: now)
    output.save_run(state="in_progress")
    for index, start, end in ((1, 0, 3), (2, 0, 1), (3, 0, 2), (1, 3, 4)):
        output.add_progress(index, progress(index, start, end))
    assert output.num_open_tokens == 7
    now = 0.2
    output.commit_if_due()
    output.add(row(2))
    output.commit()
    assert output.num_open_tokens == 6, "row 2 is finished"
    output.add_progress(3, progress(3, 2, 9))  # not committed
    assert output.num_open_tokens == 13
    output.close()
    output = open_output(tmp_path)
    assert (output.num_begun, output.num_open_tokens) == ((2, 6), 6)
    # continuation 0 has nothing
    assert output.take_generated(1) == (GeneratedTokens(), tokens(1, 0, 4))
    assert output.take_generated(3) == (GeneratedTokens(), tokens(3, 0, 2))
    assert output.take_generated(2) == output.take_generated(4) == ()
    assert output.num_begun == (0, 0)
    output.close()


def test_a_part_that_lost_committed_lines_is_refused(tmp_path: Path) -> None:
    output = open_output(tmp_path)
    output.add(row(1))
    output.commit()
    output.close()
    os.truncate(tmp_path / "part-00000.jsonl", 3)
    with pytest.raises(ValueError, match="was changed from outside"):
        BatchOutput(tmp_path)


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    output = open_output(tmp_path)
    with pytest.raises(ValueError, match=f"process {os.getpid()} is already writing"):
        BatchOutput(tmp_path)
    output.close()
    open_output(tmp_path).close()


def test_files_that_are_no_job_are_refused_and_overwritten_on_request(tmp_path: Path) -> None:
    (tmp_path / "part-00000.jsonl").write_text("precious\n")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds part-00000.jsonl but no run.json"):
        BatchOutput(tmp_path)
    assert (tmp_path / "part-00000.jsonl").read_text() == "precious\n"
    output = BatchOutput(tmp_path, overwrite=True)
    assert output.counts.finished == 0
    output.close()
    assert read(tmp_path, "part-00000.jsonl") == b""
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_run_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match="--overwrite"):
        BatchOutput(tmp_path)


def test_a_digest_needs_every_row(tmp_path: Path) -> None:
    output = open_output(tmp_path)
    for index in (0, 2):
        output.add(row(index))
    output.commit()
    with pytest.raises(AssertionError, match="row 1 is not finished"):
        output.digest(3)
    output.close()


def test_an_error_line_has_status_and_error() -> None:
    line = json.loads(failed_row(4, None, ApiError("invalid_json", "not JSON", "body"), Place("line", 5, 99)).data)
    assert line == {
        "id": "batch_req_4",
        "custom_id": None,
        "response": {
            "status_code": 400,
            "request_id": "req_4",
            "body": {
                "error": {
                    "code": "invalid_json",
                    "message": "not JSON",
                    "type": "invalid_request_error",
                    "param": "body",
                }
            },
        },
        "error": {"code": "invalid_json", "message": "not JSON", "line": 5, "byte_offset": 99},
    }


def test_an_error_digest_covers_the_code_and_not_the_message() -> None:
    def digest(index: int, custom_id: str | None, code: str, message: str) -> bytes:
        return failed_row(index, custom_id, ApiError(code, message), Place("line", 1, 0)).digest

    base = digest(0, "a", "code", "text")
    assert digest(0, "a", "code", "other text") == base
    assert len({base, digest(1, "a", "code", "text"), digest(0, "b", "code", "text"), digest(0, "a", "c", "text")}) == 4


class OutputMachine(RuleBasedStateMachine):
    """Adds, commits, crashes between any two writes, reopens; the files are always those of the committed rows."""

    @initialize()
    def start(self) -> None:
        self.directory = Path(tempfile.mkdtemp())
        self.output = open_output(self.directory, commit_rows=4)
        self.committed: list[int] = []
        self.pending: list[int] = []
        self.told: dict[int, int] = {}
        self.pending_told: dict[int, int] = {}

    @rule(index=st.integers(0, NUM_ROWS - 1))
    def add(self, index: int) -> None:
        if index in self.committed or index in self.pending:
            return
        self.output.add(row(index))
        self.pending.append(index)
        if len(self.pending) == 4:
            self.all_is_durable()

    @rule(index=st.integers(0, NUM_ROWS - 1), count=st.integers(1, 3))
    def add_progress(self, index: int, count: int) -> None:
        if index in self.committed or index in self.pending:
            return
        start = self.pending_told.get(index, self.told.get(index, 0))
        self.output.add_progress(index, progress(index, start, start + count))
        self.pending_told[index] = start + count

    @rule()
    def commit(self) -> None:
        self.output.commit()
        self.all_is_durable()

    def all_is_durable(self) -> None:
        self.committed, self.pending = self.committed + self.pending, []
        told = self.told | self.pending_told
        self.told, self.pending_told = {i: n for i, n in told.items() if i not in self.committed}, {}

    @rule(num_writes=st.integers(0, 6))
    def fail_in_commit(self, num_writes: int) -> None:
        """The disk is full at the nth write of a commit; the process gives up and another one opens the directory."""
        left = num_writes
        pwrite = os.pwrite

        def fill_up(fd: int, data: bytes, offset: int) -> int:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(28, "No space left on device")
            return pwrite(fd, data, offset)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "pwrite", fill_up)
            try:
                self.output.commit()
            except OSError:
                pass
            else:
                self.all_is_durable()
        self.reopen()

    @rule(num_bytes=st.integers(1, 60))
    def crash_with_torn_tails(self, num_bytes: int) -> None:
        for name in ("part-00000.jsonl", "errors.jsonl", "journal.log"):
            with (self.directory / name).open("ab") as file:
                file.write(b"\x20" * num_bytes)
        self.reopen()

    def reopen(self) -> None:
        self.output.close()
        self.output = open_output(self.directory, commit_rows=4)
        self.pending, self.pending_told = [], {}
        assert self.output.num_begun == (len(self.told), sum(self.told.values()))
        for index in range(NUM_ROWS):
            expected = (GeneratedTokens(), tokens(index, 0, self.told[index])) if index in self.told else ()
            assert self.output.take_generated(index) == expected

    @invariant()
    def the_committed_rows_are_there(self) -> None:
        assert [i for i in range(NUM_ROWS) if self.output.is_finished(i)] == sorted(self.committed)
        assert self.output.counts.finished == len(self.committed)
        for name, failed in (("part-00000.jsonl", False), ("errors.jsonl", True)):
            rows = [row(i) for i in self.committed]
            wanted = b"".join(r.data for r in rows if r.failed is failed)
            assert read(self.directory, name)[: len(wanted)] == wanted
        if len(self.committed) == NUM_ROWS:
            assert self.output.digest(NUM_ROWS) == expected_digest(NUM_ROWS)

    def teardown(self) -> None:
        self.output.close()
        shutil.rmtree(self.directory)


TestOutputMachine = OutputMachine.TestCase
TestOutputMachine.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
