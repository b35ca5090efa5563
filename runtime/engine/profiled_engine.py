"""An engine that measures the phases of its steps, for benchmarks; `Engine` knows nothing of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shoal.parallel.groups import ParallelGroups

from ..models.deepseek import DeepseekModel
from ..models.fused import FusedDecoderLayer
from ..models.moe import MoE
from .config import EngineConfig
from .engine import Engine
from .step import StepResult
from .step_profile import PhaseClock, StepProfile

COLLECTIVES = ("all_gather", "all_to_all", "all_to_all_bytes", "all_gather_ints", "broadcast_bytes")


class ProfiledEngine(Engine):
    """An engine that can say what its steps spent their time on; everything else is `Engine`."""

    def __init__(self, model_dir: str | Path, config: EngineConfig, groups: ParallelGroups, **options: Any) -> None:
        super().__init__(model_dir, config, groups, **options)
        self._clock = clock = PhaseClock()
        for method in ("schedule", "update", "finish"):
            clock.watch(self.scheduler, method, "scheduler")
        clock.watch(self, "_agree", "batch building")
        clock.watch(self.runner, "_prepare", "batch building")
        clock.watch(self.sampler, "sample", "sampling")
        for group in {id(group): group for group in (groups.world, groups.tp)}.values():
            for method in COLLECTIVES:
                clock.watch(group, method, "collectives")
        model = self.runner.model
        assert isinstance(model, DeepseekModel)
        _watch_model(clock, model)

    def step(self) -> StepResult:
        self._clock.begin_step()
        result = super().step()
        self._clock.end_step(counts=not (result.idle or result.stopped or result.woke))
        return result

    def profile(self) -> StepProfile:
        return self._clock.profile()


def _watch_model(clock: PhaseClock, model: DeepseekModel) -> None:
    clock.watch(model, "compute_logits", "logits")
    dispatchers = {}
    for layer in model.layers:
        fused = isinstance(layer, FusedDecoderLayer)
        clock.watch(layer if fused else layer.attention, "attend" if fused else "forward", "attention")
        if (indexer := layer.attention.indexer) is not None:
            clock.watch(indexer, "write_keys", "indexer")
            clock.watch(indexer, "select", "indexer")
        is_moe = isinstance(layer.mlp, MoE)
        mlp_phase = "experts" if is_moe else "dense mlp"
        clock.watch(layer if fused else layer.mlp, "feed_forward" if fused else "forward", mlp_phase)
        if isinstance(layer.mlp, MoE):
            dispatchers[id(layer.mlp.dispatcher)] = layer.mlp.dispatcher
    for dispatcher in dispatchers.values():  # the layers share one
        clock.watch(dispatcher, "dispatch", "dispatch")
        clock.watch(dispatcher, "combine", "combine")
