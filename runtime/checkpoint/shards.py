"""Finds the tensors of a model directory: in one file, or in several that an index lists."""

from __future__ import annotations

import json
from pathlib import Path

from .safetensors_file import MAX_HEADER_BYTES, TensorEntry, read_header, reject_duplicate_names

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_NUM_NAMED = 5
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def find_tensors(model_dir: Path) -> dict[str, TensorEntry]:
    """All tensors of the directory by name; reads headers only."""
    index = model_dir / INDEX_FILE
    if index.exists():
        return _read_shards(index)
    if (single := model_dir / SINGLE_FILE).exists():
        return read_header(single)
    raise ValueError(f"{model_dir} has neither {SINGLE_FILE} nor {INDEX_FILE}{_hint(model_dir)}")


def shorten(items: list[str]) -> str:
    """The first few of a list of names, for an error message."""
    return ", ".join(items[:_NUM_NAMED]) + (", ..." if len(items) > _NUM_NAMED else "")


def _read_shards(index: Path) -> dict[str, TensorEntry]:
    """The tensors that an index file lists, each found in the header of the file that the index names."""
    if index.stat().st_size > MAX_HEADER_BYTES:
        raise ValueError(f"{index} is larger than {MAX_HEADER_BYTES} bytes, which no index is")
    try:
        content = json.loads(index.read_bytes(), object_pairs_hook=reject_duplicate_names)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{index} is not valid JSON ({error}); download it again") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map from tensor names to files")
    headers: dict[str, dict[str, TensorEntry]] = {}
    entries: dict[str, TensorEntry] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_basename(file):
            raise ValueError(f"{index}: {name} is in {file!r}; files must be plain names in the same directory")
        path = index.parent / file
        if file not in headers:
            if not path.is_file():
                raise ValueError(f"{path} does not exist; {index.name} says it holds {name}")
            headers[file] = read_header(path)
        if name not in headers[file]:
            raise ValueError(f"{path} does not hold {name}, as {index.name} says; are files of two checkpoints mixed?")
        entries[name] = headers[file][name]
    return entries


def _hint(model_dir: Path) -> str:
    """What a directory without safetensors files may be."""
    pickled = sorted(path.name for path in model_dir.glob("*") if path.suffix in _PICKLED_SUFFIXES)
    if not pickled:
        return "; is it a model directory?"
    return f"; {shorten(pickled)} can hold code and is not read: convert the weights to safetensors"


def _is_basename(file: str) -> bool:
    """Whether `file` names something directly in a directory, on any system, and not the directory or its parent."""
    return file not in ("", ".", "..") and not any(letter in file for letter in "/\\:\0")
