"""What kinds of replicas a user asks for, in YAML or on the command line."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from shoal.parallel.config import ParallelConfig

Role = Literal["prefill", "decode", "mixed"]

_SHORT = {"tp": "tensor_parallel_size", "dp": "data_parallel_size"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaSpec:
    """Some copies of the model with the same role and layout; a bad value is a ValueError that names it."""

    role: Role = "mixed"
    """prefill computes prompts and hands them over, decode goes on with them, mixed does both for its requests."""
    count: int = 1
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise ValueError(f"role must be one of {', '.join(get_args(Role))}, got {self.role!r}")
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise ValueError(f"count must be a whole number of at least 1, got {self.count!r}")
        _ = self.parallel

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
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return (ReplicaSpec(count=value, **sizes),)
    if isinstance(value, str | int) or not isinstance(value, Sequence) or not value:
        raise ValueError(f"replicas must be a whole number of at least 1 or a list of replicas, got {value!r}")
    specs = []
    for number, item in enumerate(value):
        try:
            specs.append(item if isinstance(item, ReplicaSpec) else ReplicaSpec(**{**sizes, **_values(item)}))
        except ValueError as error:
            raise ValueError(f"replicas[{number}]: {error}") from error
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
            if not number.isdecimal() or (equals and name not in _SHORT):
                raise ValueError(f"{item!r} is not of the form ROLE[:COUNT][:tp=N][:dp=N]")
            values[_SHORT[name] if equals else "count"] = int(number)
        return values
    if not isinstance(item, Mapping):
        raise ValueError(f"must be a mapping (role, count, ..), got {item!r}")
    known = [f.name for f in fields(ReplicaSpec)]
    for name in item:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"{name} is not a known setting; {hint}")
    return dict(item)
