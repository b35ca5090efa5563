"""Kinds of replicas that a user asks for, in YAML or on the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from shoal.parallel.config import DataParallelSize, ParallelConfig, TensorParallelSize
from shoal.parallel.settings import Setting, build_settings, check_settings, shown

Role = Literal["prefill", "decode", "mixed"]

MAX_REPLICAS = 100_000
"""Far more than any cluster holds; a larger number is a slip."""
_SHORT = {"tp": "tensor_parallel_size", "dp": "data_parallel_size"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaSpec:
    """Some copies of the model with the same role and layout; a bad value is a ValueError that names it."""

    role: Annotated[
        Role,
        Setting(
            "prefill computes prompts and hands their KV cache over, decode continues with it, mixed does both for its "
            "requests."
        ),
    ] = "mixed"
    count: Annotated[int, Setting("Replicas of this kind.", ge=1, le=MAX_REPLICAS)] = 1
    tensor_parallel_size: TensorParallelSize = 1
    data_parallel_size: DataParallelSize = 1

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def parallel(self) -> ParallelConfig:
        """The layout of one copy."""
        return ParallelConfig(
            tensor_parallel_size=self.tensor_parallel_size, data_parallel_size=self.data_parallel_size
        )


def parse_replicas(
    value: int | Sequence[ReplicaSpec | Mapping[str, Any] | str], defaults: ParallelConfig
) -> tuple[ReplicaSpec, ...]:
    """A number of mixed replicas, or a list of mappings or short forms; `defaults` fills in the sizes not given."""
    sizes: dict[str, Any] = {
        "tensor_parallel_size": defaults.tensor_parallel_size,
        "data_parallel_size": defaults.data_parallel_size,
    }
    if isinstance(value, int):
        return (ReplicaSpec(count=value, **sizes),)
    if not value:
        raise ValueError("replicas is an empty list; give at least one replica")
    specs: list[ReplicaSpec] = []
    for number, item in enumerate(value):
        try:
            if not isinstance(item, ReplicaSpec):
                item = build_settings(ReplicaSpec, {**sizes, **_values(item)})
        except ValueError as error:
            raise ValueError(f"replicas[{number}]: {error}") from error
        specs.append(item)
    roles = {spec.role for spec in specs}
    for role, others in (("prefill", {"decode", "mixed"}), ("decode", {"prefill", "mixed"})):
        if role in roles and not roles & others:
            raise ValueError(f"all replicas have the role {role}; add some with the role {' or '.join(sorted(others))}")
    return tuple(specs)


def _values(item: object) -> dict[str, Any]:
    """The fields of a mapping, or of a short form like prefill:2:tp=1:dp=2."""
    if isinstance(item, str):
        role, *parts = item.split(":")
        values: dict[str, Any] = {"role": role}
        for part in parts:
            name, equals, number = part.rpartition("=")
            if not (number.isascii() and number.isdecimal()) or (equals and name not in _SHORT):
                raise ValueError(f"{shown(item)} is not of the form ROLE[:COUNT][:tp=N][:dp=N]")
            values[_SHORT[name] if equals else "count"] = int(number)
        return values
    if not isinstance(item, Mapping):
        raise ValueError(f"must be a mapping (role, count, ..), got {shown(item)}")
    return dict(item)
