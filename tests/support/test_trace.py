from __future__ import annotations

from pathlib import Path

import torch

from shoal.runtime.models.weights import TensorWeight
from shoal.runtime.random_checkpoint import make_checkpoint
from tests.support.harness import logits_in_chunks, make_runner
from tests.support.trace import Trace, first_difference


def test_names_the_first_tensor_that_differs(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v32", seed=3, dtype=torch.float32, overrides={"index_topk": 4})
    token_ids = list(range(3, 20))
    traces = []
    for chunks, damage in ([17], False), ([5, 5, 7], False), ([17], True):
        runner = make_runner(tmp_path)
        if damage:
            norm = dict(runner.model.named_weights())["layers.1.post_attention_norm"]
            assert isinstance(norm, TensorWeight)
            norm.data[7] += 0.5
        trace = Trace()
        runner.tap = trace.tap
        logits_in_chunks(runner, token_ids, chunks)
        traces.append(trace)
    assert first_difference(traces[0], traces[1]) is None
    found = first_difference(traces[0], traces[2])
    assert found is not None
    assert (found.layer, found.op) in {(1, "moe.topk_idx"), (1, "mlp")}
    assert found.max_difference > 0
    assert "layer 1" in str(found)


def test_different_shapes_differ() -> None:
    a, b = Trace(), Trace()
    a.tap(0, "attention", torch.zeros(3, 2))
    b.tap(0, "attention", torch.zeros(2, 2))
    assert str(first_difference(a, b)) == "layer 0, attention, index []: differs by up to inf"
