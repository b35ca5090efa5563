"""Which steps a graph takes, and how many rows it has; tests/gpu runs them."""

from __future__ import annotations

from msgspec.structs import replace

from shoal.runtime.engine.cuda_graphs import is_decode, padded_size
from shoal.runtime.scheduling.batch import Batch, ScheduledSequence


def test_sizes_of_graphs() -> None:
    sizes = [padded_size(count, 100) for count in range(1, 101)]
    assert sorted(set(sizes)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 100]
    assert all(count <= size <= max(count, 1.5 * count) for count, size in enumerate(sizes, 1))
    assert [padded_size(count, 5) for count in (3, 4, 5)] == [3, 4, 5]


def test_a_decode_step_has_one_generated_token_of_each_sequence() -> None:
    token = ScheduledSequence(seq_id=1, start=7, token_ids=[5], block_table=[0, 1], num_prompt_tokens=7, num_logits=1)
    assert is_decode(Batch([token, replace(token, start=9)]))
    assert not is_decode(Batch([]))
    for other in (
        replace(token, start=6),  # the last one of the prompt
        replace(token, token_ids=[5, 6]),  # computed again after a preemption
        replace(token, num_logits=0),
        replace(token, token_ids=[5, 6], num_logits=2),  # a draft token follows
    ):
        assert not is_decode(Batch([token, other]))
