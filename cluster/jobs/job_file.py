"""The YAML file that describes a batch job."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from shoal.parallel.settings import shown

from .config import JobConfig, check_names_and_values, job_config


def load_job_config(path: str | Path | None, flags: Mapping[str, Any]) -> JobConfig:
    """Settings of a YAML file, if `path` is given, overridden by `flags`. ValueError names file and key."""
    if path is None:
        return job_config(flags)
    if not str(path).strip():
        raise ValueError("config is empty; give the path of a YAML file")
    try:
        values = read_yaml(Path(path))
        if "overwrite" in values:
            raise ValueError("overwrite is a flag only, so that resuming a job never deletes it")
        check_names_and_values(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return job_config(values | dict(flags))


def read_yaml(path: Path) -> dict[Any, Any]:
    """The mapping in a YAML file; {} for an empty file. ValueError for anything else or a repeated key."""
    try:
        with path.open(encoding="utf-8") as file:
            values = yaml.load(file, Loader=_UniqueKeyLoader)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ValueError("not valid YAML: nested too deeply") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"must hold a mapping (key: value), got {shown(values)}")
    return values


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that rejects a repeated key, of which SafeLoader would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a single word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)
