"""vLLM's engine arguments to Shoal's, which have the same names where they mean the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoal.parallel.settings import shown

from ..engine_args import EngineArgs


@dataclass(frozen=True, slots=True)
class ForeignArgument:
    """An argument of vLLM that Shoal does not have."""

    harmless: tuple[object, ...] = ()
    """Values that ask for nothing, or for what Shoal does anyway; None always does."""
    advice: str = "remove it"


FOREIGN_ARGUMENTS = {
    "distributed_executor_backend": ForeignArgument(("ray", "uni"), "Ray runs the workers"),
    "disable_log_stats": ForeignArgument((True, False)),  # the processor's log_engine_metrics exports them
    "enable_chunked_prefill": ForeignArgument((True,), "prompts are always computed in chunks"),
    "enable_expert_parallel": ForeignArgument((True,), "experts are always distributed over the workers"),
    "enable_lora": ForeignArgument((False,), "there are no adapters"),
    "gpu_memory_utilization": ForeignArgument((), "use kv_cache_memory_fraction"),
    "load_format": ForeignArgument(("auto", "safetensors"), "weights are safetensors files"),
    "pipeline_parallel_size": ForeignArgument((1,), "use tensor_parallel_size and data_parallel_size"),
    "task_type": ForeignArgument(("generate",), "the models generate text"),
    "tokenizer_mode": ForeignArgument(("auto",)),
    "trust_remote_code": ForeignArgument((False, True)),  # a permission, which nothing makes use of
    # Shoal's own, which say what the processor says already:
    "ray_address": ForeignArgument((), "engines run on the Ray that runs the dataset"),
}


def read_engine_kwargs(model_source: str, kwargs: Mapping[str, Any], accelerator_type: str | None) -> EngineArgs:
    """The settings of one engine; ValueError names the argument that is unknown or cannot be honoured."""
    values: dict[str, Any] = {}
    for name, value in kwargs.items():
        foreign = FOREIGN_ARGUMENTS.get(name)
        if foreign is None:
            values[name] = value
        elif value is not None and value not in foreign.harmless:
            raise ValueError(f"engine_kwargs: {name} = {shown(value)} is not supported: {foreign.advice}")
    if values.setdefault("model", model_source) != model_source:
        raise ValueError("engine_kwargs: model is not the processor's model_source; remove it")
    if accelerator_type is not None and values.setdefault("device", "cuda") != "cuda":
        raise ValueError(f"engine_kwargs: device = {values['device']} contradicts accelerator_type {accelerator_type}")
    try:
        args = EngineArgs.from_dict(values)
    except ValueError as error:
        raise ValueError(f"engine_kwargs: {error}") from error
    if accelerator_type is not None and runs_apart(args):
        raise ValueError(
            "accelerator_type is for engines of one worker; the workers of a larger engine take any GPU, so leave it "
            "out and choose the nodes by the cluster"
        )
    return args


def runs_apart(args: EngineArgs) -> bool:
    """Whether an engine has workers of its own on Ray; otherwise it runs in the process that asks it."""
    return args.num_workers > 1 or args.spares > 0
