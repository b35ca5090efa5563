from __future__ import annotations

import pytest

from shoal.parallel.placement import ExpertPlacement


def test_contiguous_split_gives_the_first_ranks_one_more() -> None:
    assert ExpertPlacement.contiguous(5, 3).slots == ((0, 1), (2, 3), (4,))
    assert ExpertPlacement.contiguous(6, 2).slots == ((0, 1, 2), (3, 4, 5))
    assert ExpertPlacement.contiguous(3, 1).local_experts(0) == [0, 1, 2]


def test_round_robin_deals_experts_out_in_turn() -> None:
    assert ExpertPlacement.round_robin(5, 3).slots == ((0, 3), (1, 4), (2,))
    assert ExpertPlacement.round_robin(2, 3).slots == ((0,), (1,), ())


def test_more_ranks_than_experts_leaves_ranks_without_any() -> None:
    placement = ExpertPlacement.contiguous(2, 4)
    assert placement.slots == ((0,), (1,), (), ())
    assert placement.local_experts(3) == []
    assert placement.num_ranks == 4


def test_lookup_of_single_copies_is_the_same_for_every_source() -> None:
    placement = ExpertPlacement(4, ((3, 0), (), (1, 2)))
    for source in range(3):
        ranks, slots = placement.lookup(source)
        assert ranks.tolist() == [0, 2, 2, 0]
        assert slots.tolist() == [1, 0, 1, 0]


def test_sources_take_turns_over_the_copies() -> None:
    placement = ExpertPlacement(2, ((0, 1), (0,), (1, 0)))
    assert placement.copies == (((0, 0), (1, 0), (2, 1)), ((0, 1), (2, 0)))
    chosen = [[t.tolist() for t in placement.lookup(source)] for source in range(4)]
    assert chosen == [[[0, 0], [0, 1]], [[1, 2], [0, 0]], [[2, 0], [1, 1]], [[0, 2], [0, 0]]]


def test_placements_that_cannot_serve_are_refused() -> None:
    with pytest.raises(ValueError, match=r"experts \[1\] have no slot"):
        ExpertPlacement(3, ((0,), (2,)))
    with pytest.raises(ValueError, match=r"names experts \[7\], the model has experts 0 to 2"):
        ExpertPlacement(3, ((0, 1), (2, 7)))
    with pytest.raises(ValueError, match="at least one rank"):
        ExpertPlacement(0, ())
