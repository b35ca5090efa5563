"""A journal whose disk fills up and whose writer is killed at any byte: what is read is what was appended."""

from __future__ import annotations

from random import Random
from typing import Any, cast

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from shoal.cluster.jobs import journal as journal_module
from shoal.cluster.jobs.journal import Journal, ProgressRecord, Record, RowRecord
from shoal.runtime.types import GeneratedTokens
from tests.simulation.job import MemoryFile
from tests.simulation.virtual import DriverKilled

pytestmark = pytest.mark.slow

groups = st.lists(
    st.builds(RowRecord, st.integers(0, 9), st.booleans(), st.just(1), st.just(bytes(32)), st.just(2), st.just(3))
    | st.builds(ProgressRecord, st.integers(0, 9), st.just(0), st.just(0), st.just(GeneratedTokens((1, 2, 3)))),
    min_size=1,
    max_size=3,
)


class JournalMachine(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 2**16))
    def start(self, seed: int) -> None:
        self.file = MemoryFile(Random(seed))
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(journal_module, "os", self.file)
        self.appended: list[Record] = []
        self.reopen()

    @rule(group=groups)
    def append(self, group: list[Record]) -> None:
        self.journal.append(group)
        self.appended += group

    @rule(group=groups)
    def append_to_a_full_disk(self, group: list[Record]) -> None:
        self.file.writes_left, self.file.is_full = 0, True
        with pytest.raises(OSError, match="No space"):
            self.journal.append(group)

    @rule(group=groups)
    def append_and_be_killed(self, group: list[Record]) -> None:
        self.file.writes_left, self.file.is_full = 0, False
        with pytest.raises(DriverKilled):
            self.journal.append(group)
        found = self.read()
        assert found[: len(self.appended)] == self.appended
        assert found[len(self.appended) :] == group[: len(found) - len(self.appended)]
        self.appended = found

    @rule()
    def reopen(self) -> None:
        assert self.read() == self.appended

    def read(self) -> list[Record]:
        found: list[Record] = []
        self.journal = Journal(cast(Any, self.file), found.append)
        return found

    def teardown(self) -> None:
        if hasattr(self, "patch"):
            self.reopen()
            self.patch.undo()


TestJournalMachine = JournalMachine.TestCase
TestJournalMachine.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
