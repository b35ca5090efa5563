"""Settings of engines: the model, its layout over workers, and how each engine runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from shoal.parallel.config import DataParallelSize, ParallelConfig, TensorParallelSize
from shoal.parallel.settings import Setting, build_settings, check_settings
from shoal.runtime.chat.names import ChatFormatName
from shoal.runtime.engine.config import EngineConfig

from .replica_spec import MAX_REPLICAS, ReplicaSpec, parse_replicas

if TYPE_CHECKING:
    from shoal.runtime.models.config import ModelConfig

Device = Literal["cpu", "cuda"]
Executor = Literal["auto", "ray", "inprocess"]
"""Where the engines of an `LLM` run."""
KVTransportName = Literal["auto", "nixl", "ray"]
GenerationConfig = Literal["auto", "none", "vllm"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineArgs(EngineConfig):
    """`EngineConfig` plus the model and the layout; a bad value is a ValueError that names it."""

    model: Annotated[
        str,
        Setting(
            "Model directory with config.json, *.safetensors and tokenizer.json; every node sees it under this path.",
            metavar="DIR",
            is_path=True,
        ),
    ]
    tensor_parallel_size: TensorParallelSize = 1
    data_parallel_size: DataParallelSize = 1
    replicas: Annotated[
        int | Sequence[Any],
        Setting(
            "Copies of the model, each with data_parallel_size x tensor_parallel_size workers; or a list of kinds of "
            "replicas with roles (prefill, decode or mixed) and sizes of their own.",
            ge=1,
            le=MAX_REPLICAS,
            metavar="N | ROLE[:COUNT][:tp=N][:dp=N]",
        ),
    ] = 1
    kv_transport: Annotated[
        KVTransportName,
        Setting(
            "How the KV cache gets from prefill to decode replicas; auto is nixl on one node where it is installed, "
            "else ray. nixl is fast and trusts its network: whoever reaches a worker's port can read and write the "
            "worker's memory."
        ),
    ] = "auto"
    device: Annotated[Device, Setting("Device of the workers; cuda gives every worker one GPU of its own.")] = "cpu"
    num_threads_per_worker: Annotated[
        int | None,
        Setting(
            "CPU threads of a worker.",
            ge=1,
            derived="the cores of its node, or its CPU quota, divided by the workers on it; at most OMP_NUM_THREADS",
        ),
    ] = None
    ray_address: Annotated[
        str | None,
        Setting(
            "Address of the Ray cluster to use.",
            metavar="ADDRESS",
            derived="the cluster of the Ray job that this process belongs to, else a Ray of its own on this machine",
        ),
    ] = None
    insecure: Annotated[bool, Setting("Start on several nodes although Ray's authentication is off.")] = False
    spares: Annotated[
        int,
        Setting("Standby processes that take the place of lost workers; without one, a new process is started.", ge=0),
    ] = 0
    heartbeat_timeout_s: Annotated[
        float,
        Setting("Seconds of silence after which a worker counts as lost, although its process may be there.", gt=0),
    ] = 5.0
    startup_timeout_s: Annotated[float, Setting("Longest wait for all workers to start, in seconds.", gt=0)] = 600.0
    collective_timeout_s: Annotated[
        float,
        Setting(
            "Longest wait of a rank for another one inside a step, and of the driver for a step, in seconds.", gt=0
        ),
    ] = 120.0

    chat_format: Annotated[
        ChatFormatName | None,
        Setting(
            "How conversations are written and answers are read.", derived="by the chat template of the checkpoint"
        ),
    ] = None
    generation_config: Annotated[
        GenerationConfig,
        Setting(
            "auto takes the sampling defaults of the model's generation_config.json; none, or vLLM's word vllm, does "
            "not."
        ),
    ] = "auto"

    metrics_prefix: Annotated[
        str,
        Setting(
            "Beginning of the names of metrics; vllm: serves dashboards made for vLLM, and on Ray, which puts ray_ "
            "before it, Ray's own."
        ),
    ] = "shoal_"

    def __post_init__(self) -> None:
        check_settings(self)
        _ = self.replica_specs
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*:?", self.metrics_prefix):
            raise ValueError(
                f"metrics_prefix must be letters, digits and _, with a colon at the end at most, got "
                f"{self.metrics_prefix!r}"
            )

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
        # Not at the top: `--help` must not load torch.
        from shoal.runtime.generation_config import read_sampling_defaults

        return read_sampling_defaults(self.model) if self.generation_config == "auto" else {}

    def to_engine_config(self) -> EngineConfig:
        """The part that an engine sees."""
        return EngineConfig(**{f.name: getattr(self, f.name) for f in fields(EngineConfig)})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EngineArgs:
        """Build from plain data; an unknown name is a ValueError that suggests the nearest known one."""
        return build_settings(cls, values)


def read_model_config(args: EngineArgs) -> ModelConfig:
    """The model's configuration; ValueError, before any weight is read, when the model cannot be run as asked."""
    # Not at the top: the command line reads its options from this module and must not load torch for `--help`.
    from shoal.runtime.engine.model_loading import check_layout
    from shoal.runtime.models.families import read_config

    config = read_config(args.model)
    for spec in args.replica_specs:
        check_layout(config, spec.tensor_parallel_size)
    if args.max_model_len is not None and args.max_model_len > config.max_position_embeddings:
        raise ValueError(
            f"max_model_len {args.max_model_len} is above the model's max_position_embeddings "
            f"({config.max_position_embeddings})"
        )
    return config
