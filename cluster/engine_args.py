"""Everything a user says about engines: the model, its layout over workers, and how each engine runs."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from shoal.parallel.config import ParallelConfig
from shoal.runtime.engine.config import EngineConfig
from shoal.runtime.engine.model_loading import check_layout
from shoal.runtime.generation_config import read_sampling_defaults
from shoal.runtime.models.config import ModelConfig

from .replica_spec import ReplicaSpec, parse_replicas

Device = Literal["cpu", "cuda"]
KVTransportName = Literal["auto", "nixl", "ray"]
GenerationConfig = Literal["auto", "none", "vllm"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineArgs(EngineConfig):
    """`EngineConfig` plus the model and the layout; a bad value is a ValueError that names it."""

    model: str
    """Directory with config.json and the safetensors files; every node must see it under this path."""
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    replicas: int | Sequence[Any] = 1
    """Copies of the model, each with data_parallel_size x tensor_parallel_size workers; or a list of `ReplicaSpec`
    (as such, as mappings, or as "prefill:2:tp=1:dp=2"), which give roles and sizes of their own."""
    kv_transport: KVTransportName = "auto"
    """How cache records go from prefill to decode replicas; auto is nixl on one node where it is installed, else ray.

    nixl is fast and trusts its network: whoever reaches a worker's port can read and write the worker's memory."""
    device: Device = "cpu"
    """cuda gives every worker one GPU of its own."""
    num_threads_per_worker: int | None = None
    """CPU threads of a worker; None: the cores of its node divided by the workers on it, at least 1."""
    ray_address: str | None = None
    """None: the cluster of the Ray job that this process belongs to, else an embedded local Ray."""
    insecure: bool = False
    """Start on several nodes although Ray's authentication is off."""
    spares: int = 0
    """Processes that wait to take the place of a worker that is lost; without one, a new process is started."""
    heartbeat_timeout_s: float = 5.0
    """A worker that is silent for longer counts as lost, although its process may be there."""
    startup_timeout_s: float = 600.0
    collective_timeout_s: float = 120.0
    """The longest that a rank waits for another one inside a step, and that the driver waits for a step."""
    generation_config: GenerationConfig = "auto"
    """auto takes the sampling defaults of the model's generation_config.json; none, or vLLM's word vllm, does not."""

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(f"model must be the path of a model directory, got {self.model!r}")
        _ = self.replica_specs
        threads = self.num_threads_per_worker
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise ValueError(f"num_threads_per_worker must be a whole number of at least 1, got {threads!r}")
        if self.kv_transport not in ("auto", "nixl", "ray"):
            raise ValueError(f"kv_transport must be one of auto, nixl, ray, got {self.kv_transport!r}")
        if isinstance(self.spares, bool) or not isinstance(self.spares, int) or self.spares < 0:
            raise ValueError(f"spares must be a whole number of at least 0, got {self.spares!r}")
        for name in ("startup_timeout_s", "collective_timeout_s", "heartbeat_timeout_s"):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not (math.isfinite(value) and value > 0)
            ):
                raise ValueError(f"{name} must be a number of seconds above 0, got {value!r}")
        if self.generation_config not in ("auto", "none", "vllm"):
            raise ValueError(f"generation_config must be one of auto, none, vllm, got {self.generation_config!r}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be one of cpu, cuda, got {self.device!r}")

    @property
    def replica_specs(self) -> tuple[ReplicaSpec, ...]:
        """One per replica, with count 1, in the order in which they were asked for."""
        sizes = ParallelConfig(
            tensor_parallel_size=self.tensor_parallel_size, data_parallel_size=self.data_parallel_size
        )
        specs = parse_replicas(self.replicas, sizes)
        return tuple(replace(spec, count=1) for spec in specs for _ in range(spec.count))

    @property
    def hands_over(self) -> bool:
        """Whether some replicas compute prompts for others."""
        return any(spec.role == "prefill" for spec in self.replica_specs)

    @property
    def num_workers(self) -> int:
        """Workers of all replicas together."""
        return sum(spec.parallel.world_size for spec in self.replica_specs)

    @property
    def layout(self) -> dict[str, Any]:
        """The replicas as plain data, for reports."""
        if isinstance(self.replicas, int):
            return {name: getattr(self, name) for name in ("tensor_parallel_size", "data_parallel_size", "replicas")}
        return {"replicas": [asdict(spec) for spec in self.replica_specs]}

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """Sampling fields for requests that leave them out; reads the model directory."""
        return read_sampling_defaults(self.model) if self.generation_config == "auto" else {}

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
    for spec in args.replica_specs:
        check_layout(config, spec.tensor_parallel_size)
    if args.max_model_len is not None and args.max_model_len > config.max_position_embeddings:
        raise ValueError(
            f"max_model_len {args.max_model_len} is above the model's max_position_embeddings "
            f"({config.max_position_embeddings})"
        )
    return config
