"""Reads the quantization_config of compressed-tensors: symmetric int4 with one scale per group, and no other scheme."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .int4_groups import VALUES_PER_INT32, find_int4
from .safetensors_file import TensorEntry

METHOD = "compressed-tensors"

_CONFIG = "quantization_config"
_REGEX = "re:"
_LINEAR = "Linear"
_NOT_LINEAR = ("embed_tokens", "mlp.gate")
"""Ends of the names of matrices in modules of another class: the embedding and the router."""
_UNSUPPORTED = ("kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config")
_WEIGHTS: dict[str, tuple[object, ...]] = {
    "num_bits": (4,),
    "type": ("int",),
    "symmetric": (True,),
    "strategy": ("group",),
    "dynamic": (False, None),
    "actorder": (None, False),
    "block_structure": (None,),
}
"""Fields of a scheme's `weights` and their supported values, the first of which stands for all in messages."""


@dataclass(frozen=True, slots=True)
class Int4Groups:
    """Which matrices of a checkpoint are int4, and how many columns of them share a scale."""

    group_size: int
    targets: tuple[str, ...]
    """Modules that are quantised: names, "re:" and a regular expression for names, or the class Linear."""
    ignore: tuple[str, ...]
    """Modules that are not, although they are targets."""
    prefix: str
    """Beginning of all names of the decoder, which targets and ignore may leave out."""

    def covers(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the tensor of that name and shape is int4."""
        if len(shape) != 2:
            return False
        module = name.removesuffix(".weight")
        names = {module, module.removeprefix(self.prefix)}
        return _is_any(self.targets, names) and not _is_any(self.ignore, names)


def find_int4_matrices(
    entries: Mapping[str, TensorEntry], expected: Mapping[str, tuple[int, ...]], int4: Int4Groups | None
) -> set[str]:
    """Names of the expected tensors that the configuration says are int4; int4 None: none are.

    ValueError where the headers say something else; matrices that are missing are no error here.
    """
    found = {name for name, shape in expected.items() if int4 is not None and int4.covers(name, shape)}
    for name in expected:
        if name in entries and name in found:
            raise ValueError(
                f"{entries[name].path}: {name} is stored unquantised, but by targets and ignore of {_CONFIG} it is "
                f"int4; correct config.json"
            )
        matrix = None if name in entries else find_int4(entries, name)
        if matrix is None:
            continue
        if int4 is None or name not in found:
            raise ValueError(
                f"{matrix.packed.path}: {matrix.packed.name} is quantised by {METHOD}, but by targets and ignore of "
                f"{_CONFIG} {name} is not; correct config.json"
            )
        if matrix.group_size != int4.group_size:
            raise ValueError(
                f"{matrix.scales.path}: {matrix.scales.name} is {list(matrix.scales.shape)}, which makes groups of "
                f"{matrix.group_size} for {name} {list(matrix.shape)}; group_size of {_CONFIG} is {int4.group_size}"
            )
    return found


def read_int4_groups(config: Mapping[str, Any], prefix: str) -> Int4Groups:
    """Read a quantization_config of method compressed-tensors; ValueError names the field that is not supported."""
    _check("format", config.get("format"), ("pack-quantized",))
    for name in _UNSUPPORTED:
        if config.get(name):
            raise ValueError(f"{_CONFIG} with {name} {config[name]!r} is not supported, only null is")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise ValueError(f"{_CONFIG}: config_groups must be an object with one scheme, got {groups!r}")
    ((group, scheme),) = groups.items()
    path = f"config_groups.{group}"
    if not isinstance(scheme, Mapping) or not isinstance(weights := scheme.get("weights"), Mapping):
        raise ValueError(f"{_CONFIG}: {path} must be an object with the object weights, got {scheme!r}")
    _check(f"{path}.format", scheme.get("format"), ("pack-quantized", None))
    for name in ("input_activations", "output_activations"):
        _check(f"{path}.{name}", scheme.get(name), (None,))
    for name, supported in _WEIGHTS.items():
        _check(f"{path}.weights.{name}", weights.get(name), supported)
    size = weights.get("group_size")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or size % VALUES_PER_INT32:
        raise ValueError(f"{_CONFIG}: {path}.weights.group_size must be a multiple of {VALUES_PER_INT32}, got {size!r}")
    return Int4Groups(
        group_size=size,
        targets=_patterns(f"{path}.targets", scheme.get("targets")),
        ignore=_patterns("ignore", config.get("ignore") or []),
        prefix=prefix,
    )


def _check(name: str, value: object, supported: tuple[object, ...]) -> None:
    """ValueError unless `value` is one of the supported ones, also in its type."""
    if not any(type(value) is type(one) and value == one for one in supported):
        raise ValueError(
            f"{_CONFIG} with {name} {value!r} is not supported; of {METHOD}, only {supported[0]!r} is "
            f"(format pack-quantized, symmetric int4 weights, strategy group)"
        )


def _patterns(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(pattern, str) for pattern in value):
        raise ValueError(f"{_CONFIG}: {name} must be a list of names and {_REGEX} patterns, got {value!r}")
    for pattern in value:
        try:
            re.compile(pattern.removeprefix(_REGEX) if pattern.startswith(_REGEX) else "")
        except re.error as error:
            raise ValueError(f"{_CONFIG}: {name} has the invalid pattern {pattern!r} ({error})") from error
    return tuple(value)


def _is_any(patterns: Iterable[str], names: Iterable[str]) -> bool:
    return any(_matches(pattern, name) for pattern in patterns for name in names)


def _matches(pattern: str, name: str) -> bool:
    """Whether a target names a module: expressions match from the start of the name on, as in compressed-tensors."""
    if pattern.startswith(_REGEX):
        return re.match(pattern.removeprefix(_REGEX), name) is not None
    return pattern == name or (pattern == _LINEAR and not name.endswith(_NOT_LINEAR))
