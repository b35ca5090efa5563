"""Everything a user says about engines: the model, its layout over workers, and how each engine runs."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from shoal.parallel.config import ParallelConfig
from shoal.runtime.engine import check_layout
from shoal.runtime.engine_config import EngineConfig
from shoal.runtime.models.config import ModelConfig

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineArgs(EngineConfig):
    """`EngineConfig` plus the model and the layout; a bad value is a ValueError that names it."""

    model: str
    """Directory with config.json and the safetensors files; every node must see it under this path."""
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    replicas: int = 1
    """Copies of the model; each has data_parallel_size x tensor_parallel_size workers."""
    device: Device = "cpu"
    """cuda gives every worker one GPU of its own."""
    num_threads_per_worker: int | None = None
    """CPU threads of a worker; None: the cores of its node divided by the workers on it, at least 1."""
    ray_address: str | None = None
    """None: the cluster of the Ray job that this process belongs to, else an embedded local Ray."""
    insecure: bool = False
    """Start on several nodes although Ray's authentication is off."""
    startup_timeout_s: float = 600.0
    collective_timeout_s: float = 120.0
    """The longest that a rank waits for another one inside a step, and that the driver waits for a step."""

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(f"model must be the path of a model directory, got {self.model!r}")
        _ = self.parallel_config
        for name in ("replicas", "num_threads_per_worker"):
            value = getattr(self, name)
            if name == "num_threads_per_worker" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("startup_timeout_s", "collective_timeout_s"):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not (math.isfinite(value) and value > 0)
            ):
                raise ValueError(f"{name} must be a number of seconds above 0, got {value!r}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be one of cpu, cuda, got {self.device!r}")

    @property
    def parallel_config(self) -> ParallelConfig:
        """The layout of one replica."""
        return ParallelConfig(
            tensor_parallel_size=self.tensor_parallel_size, data_parallel_size=self.data_parallel_size
        )

    @property
    def num_workers(self) -> int:
        """Workers of all replicas together."""
        return self.replicas * self.parallel_config.world_size

    def to_engine_config(self) -> EngineConfig:
        """The part that an engine sees."""
        return EngineConfig(**{f.name: getattr(self, f.name) for f in fields(EngineConfig)})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EngineArgs:
        """Build from plain data; an unknown name is a ValueError that suggests the nearest known one."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
                raise ValueError(f"unknown engine argument {name!r}; {hint}")
        if "model" not in values:
            raise ValueError("model is missing; give the path of a model directory")
        return cls(**values)


def read_model_config(args: EngineArgs) -> ModelConfig:
    """The model's configuration; ValueError, before any weight is read, when the model cannot be run as asked."""
    config = ModelConfig.from_pretrained(args.model)
    check_layout(config, args.tensor_parallel_size)
    if args.max_model_len is not None and args.max_model_len > config.max_position_embeddings:
        raise ValueError(
            f"max_model_len {args.max_model_len} is above the model's max_position_embeddings "
            f"({config.max_position_embeddings})"
        )
    return config
