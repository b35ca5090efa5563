"""Commands to workers when others are lost, found and join; any order of such events ends with all ranks formed."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from shoal.cluster.supervision.membership import Action, Formed, Join, Leave, Load, Membership, Need


def test_a_lost_worker_is_replaced_in_a_new_epoch() -> None:
    members = Membership(["a", "b", "c"])
    assert members.formed
    assert members.lose("b") == [Leave("a", 0), Leave("c", 0), Need(1)]
    assert members.lose("b") == [] == members.lose("stranger")
    assert members.fill(1, "d") == [Load("d", 1)]
    assert members.reform(0) == [], "not before all have their weights"
    assert members.loaded("a") == []
    assert members.loaded("d") == [Join("a", 0, 1, (1,)), Join("d", 1, 1, (1,)), Join("c", 2, 1, (1,))]
    assert members.join("a", 1) == members.join("d", 1) == members.join("c", 0) == []
    assert members.missing == ["c"]
    assert not members.formed
    assert members.join("c", 1) == [Formed(1)]
    assert members.formed


def test_a_loss_while_forming_adds_to_what_was_replaced() -> None:
    members = Membership(["a", "b", "c"])
    members.lose("b")
    members.fill(1, "d")
    members.loaded("d")
    members.join("a", 1)
    assert members.lose("c") == [Leave("a", 1), Leave("d", 1), Need(2)]
    assert members.join("d", 1) == []
    assert members.fill(2, "e") == [Load("e", 2)]
    assert members.missing == []
    assert members.loaded("e") == [Join(w, r, 2, (1, 2)) for r, w in enumerate("ade")], "a may not know of b's end yet"


def test_missing_lists_late_joiners_or_everyone() -> None:
    members = Membership(["a", "b", "c"])
    members.reform(0)
    members.joining("a", 1)
    members.joining("b", 0)
    members.joining("stranger", 1)
    members.joining("c", 1)
    assert members.missing == ["b"]
    members.joining("b", 1)
    assert members.missing == ["a", "b", "c"]
    members.join("b", 1)
    assert members.missing == ["a", "c"]
    members.reform(1)
    assert members.missing == ["a", "b", "c"]


def test_a_loss_while_loading_is_a_loss_like_others() -> None:
    members = Membership(["a", "b"])
    members.lose("b")
    members.fill(1, "c")
    assert members.lose("c") == [Leave("a", 0), Need(1)]
    assert members.loaded("c") == []
    members.fill(1, "d")
    assert members.loaded("d") == [Join("a", 0, 1, (1,)), Join("d", 1, 1, (1,))]


def test_ranks_that_left_although_all_live_join_again() -> None:
    members = Membership(["a", "b"])
    assert members.reform(0) == [Leave("a", 0), Leave("b", 0), Join("a", 0, 1, ()), Join("b", 1, 1, ())]
    assert members.reform(0) == [], "that was the epoch before"
    members.lose("a")
    assert members.reform(1) == [], "nobody to join with"


class MembershipMachine(RuleBasedStateMachine):
    """Workers that hear what they are told late, or never because they died; the network keeps each one's order."""

    @initialize(size=st.integers(1, 4))
    def start(self, size: int) -> None:
        self.members = Membership([f"w{i}" for i in range(size)])
        self.inbox: dict[str, list[Leave | Load | Join]] = {f"w{i}": [] for i in range(size)}
        self.epoch_of = dict.fromkeys(self.inbox, 0)
        self.wanted: list[int] = []
        self.num_workers = size
        self.last_formed = 0

    def act(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Need):
                self.wanted.append(action.rank)
            elif isinstance(action, Formed):
                assert action.epoch > self.last_formed
                self.last_formed = action.epoch
                assert set(self.epoch_of.values()) == {action.epoch}, "somebody is in another epoch"
            else:
                self.inbox[action.worker].append(action)

    @precondition(lambda self: self.inbox)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.inbox)))
        del self.inbox[worker], self.epoch_of[worker]
        self.act(self.members.lose(worker))

    @precondition(lambda self: self.wanted)
    @rule()
    def find(self) -> None:
        worker = f"w{self.num_workers}"
        self.num_workers += 1
        self.inbox[worker], self.epoch_of[worker] = [], -1
        self.act(self.members.fill(self.wanted.pop(), worker))

    @precondition(lambda self: any(self.inbox.values()))
    @rule(data=st.data())
    def hear(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(w for w, inbox in self.inbox.items() if inbox)))
        message = self.inbox[worker].pop(0)
        if isinstance(message, Load):
            self.act(self.members.loaded(worker))
        if isinstance(message, Join):
            assert message.epoch > self.epoch_of[worker]
            assert self.epoch_of[worker] >= 0 or message.rank in message.replaced, (
                "a newcomer not announced to the others"
            )
            self.epoch_of[worker] = message.epoch
            self.act(self.members.join(worker, message.epoch))

    @precondition(lambda self: self.inbox)
    @rule()
    def leave(self) -> None:
        self.act(self.members.reform(self.members.epoch))

    def teardown(self) -> None:
        if not hasattr(self, "members"):
            return
        while self.wanted:
            self.find()
        while worker := next((w for w, inbox in self.inbox.items() if inbox), None):
            message = self.inbox[worker].pop(0)
            if isinstance(message, Load):
                self.act(self.members.loaded(worker))
            if isinstance(message, Join):
                self.epoch_of[worker] = message.epoch
                self.act(self.members.join(worker, message.epoch))
        assert self.members.formed


TestMembershipMachine = MembershipMachine.TestCase
TestMembershipMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
