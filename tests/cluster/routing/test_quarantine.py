"""Which requests run together after losses, and which one is given up."""

from __future__ import annotations

import pytest

from shoal.cluster.routing.quarantine import Quarantine


def test_one_loss_in_common_holds_nobody_back() -> None:
    quarantine = Quarantine()
    assert quarantine.allowed() is None
    assert quarantine.lose({"a", "b", "c"}) == []
    assert quarantine.allowed() is None
    assert [quarantine.num_losses(r) for r in ("a", "b", "d")] == [1, 1, 0]


def test_those_that_share_two_losses_run_by_eights() -> None:
    quarantine = Quarantine()
    names = [f"{number:02}" for number in range(20)]
    for _ in range(2):
        quarantine.lose(names)
    first = quarantine.allowed()
    assert first == frozenset(names[:8])
    for name in names[:7]:
        quarantine.forget(name)
    assert quarantine.allowed() == frozenset({"07"})
    quarantine.forget("07")
    assert quarantine.allowed() == frozenset(names[8:16])


def test_a_third_loss_isolates_and_the_innocent_run_first() -> None:
    quarantine = Quarantine()
    quarantine.add("a", 2)
    quarantine.add("b", 2)
    quarantine.add("c", 2)
    assert quarantine.allowed() == frozenset({"a", "b", "c"})
    assert quarantine.lose(["a", "b"]) == []
    assert quarantine.allowed() == frozenset({"c"})
    quarantine.forget("c")
    assert quarantine.allowed() == frozenset({"a"})
    quarantine.forget("a")
    assert quarantine.allowed() == frozenset({"b"})
    quarantine.forget("b")
    assert quarantine.allowed() is None


@pytest.mark.parametrize("num_earlier", [0, 1, 2])
def test_a_request_that_loses_its_worker_alone_is_given_up_after_four_losses(num_earlier: int) -> None:
    quarantine = Quarantine()
    quarantine.add("bad", num_earlier)
    assert [quarantine.lose(["bad"]) for _ in range(4 - num_earlier)] == [[]] * (3 - num_earlier) + [["bad"]]


def test_losses_in_company_blame_nobody() -> None:
    quarantine = Quarantine()
    assert [quarantine.lose(["a", "b"]) for _ in range(9)] == [[]] * 9
    assert quarantine.lose(["a"]) == []
    assert quarantine.lose(["a"]) == ["a"]


def test_earlier_runs_blame_nobody_alone() -> None:
    """They may have lost the request in company; one more run must have lost it alone."""
    quarantine = Quarantine()
    quarantine.add("a", 7)
    assert [quarantine.lose(["a"]), quarantine.lose(["a"])] == [[], ["a"]]
