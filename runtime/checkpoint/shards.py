"""Finds the tensors of a model directory: in one file, or in the shards of a set, with or without their index.

The headers of the files are the authority. An index chooses the files to read, and decides between two files that hold
a tensor of the same name. Anything else that it lists may be missing as long as the model does not need it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from .file_kinds import read_json
from .model_directory import WEIGHT_SUFFIX, describe_directory, describe_missing, find_file, list_names, shorten
from .safetensors_file import MAX_HEADER_BYTES, SafetensorsHeader, TensorEntry, read_header, reject_duplicate_names

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_SHARD = re.compile(r"(.+?)-(\d{1,6})-of-(\d{1,6})\.safetensors", re.IGNORECASE)
_MAX_SHARDS = 10_000
_DEMO_SHARD = re.compile(r"model\d+-mp\d+\.safetensors", re.IGNORECASE)
_OTHER_FORMS = ("adapter", "consolidated")
"""Beginnings of the names of weights that are read only if there are no others: adapters, and another layout."""


class FoundTensors(NamedTuple):
    """The tensors of a directory by name."""

    entries: dict[str, TensorEntry]
    remarks: list[str]
    """Irregularities: notices where no tensor that is needed is missing, else explanations."""


class _Choice(NamedTuple):
    """The files to read."""

    files: list[str]
    places: dict[str, str]
    """Tensor name to file, as far as an index says."""
    remarks: list[str]


class ShardSet(NamedTuple):
    """Set of shards: that of model-00001-of-00003.safetensors is ("model", "00003")."""

    stem: str
    total: str

    @classmethod
    def of(cls, file: str) -> ShardSet | None:
        """The set that a file name belongs to; None if its name does not say."""
        match = _SHARD.fullmatch(file)
        return cls(match[1].lower(), match[3]) if match and int(match[3]) <= _MAX_SHARDS else None

    def files(self, present: Iterable[str]) -> list[str]:
        """All files of the set, those that are missing included, named like those that are `present`."""
        numbers = {}
        example = ""
        for file in present:
            if ShardSet.of(file) == self and (match := _SHARD.fullmatch(file)):
                numbers[int(match[2])] = file
                example = example or match[2]
        width = len(example) if example.startswith("0") else 1
        return [
            numbers.get(i, f"{self.stem}-{i:0{width}d}-of-{self.total}{WEIGHT_SUFFIX}")
            for i in range(1, int(self.total) + 1)
        ]


def find_tensors(model_dir: Path) -> FoundTensors:
    """Read the headers of a directory's weights. ValueError where no file can be used or it is unclear which to use."""
    weights = [name for name in list_names(model_dir) if name.lower().endswith(WEIGHT_SUFFIX)]
    index = find_file(model_dir, INDEX_FILE)
    choice = _choose_files(model_dir, weights, {} if index is None else read_index(index))
    headers: dict[str, SafetensorsHeader] = {}
    remarks = []
    for name in choice.files:
        path = find_file(model_dir, name)
        try:
            if path is None or not path.is_file():
                raise ValueError(f"{describe_missing(path or model_dir / name)}{_listed_for(name, choice.places)}")
            headers[name] = read_header(path)
        except ValueError as error:
            remarks.append(str(error))
    if not headers:
        raise ValueError("; ".join(remarks[:1] + choice.remarks))
    merged = _merge(headers, choice.places)
    return FoundTensors(merged.entries, remarks + merged.remarks + choice.remarks)


def read_index(index: Path) -> dict[str, str]:
    """Read the weight_map of an index: from tensor name to file, which is a plain name in the same directory."""
    try:
        content = read_json(index, MAX_HEADER_BYTES, object_pairs_hook=reject_duplicate_names)
    except ValueError as error:
        raise ValueError(f"{error}, or remove it if all weights are there") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{index} has no weight_map from tensor names to files; download it again, or remove it if all weights are "
            "there"
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_basename(file):
            raise ValueError(f"{index}: {name} is in {file!r}; files must be plain names in the same directory")
    return weight_map


def _choose_files(model_dir: Path, weights: list[str], places: dict[str, str]) -> _Choice:
    """The files that the index lists and the others of their sets; without an index or those files, what is there."""
    if not places and not weights:
        raise ValueError(f"{model_dir} has neither {SINGLE_FILE} nor {INDEX_FILE}{describe_directory(model_dir)}")
    listed = sorted(set(places.values()))
    remarks = []
    if not weights or any(find_file(model_dir, name) for name in listed):
        known = {name.lower() for name in listed}
        sets = {ShardSet.of(name) for name in listed} - {None}
        files = listed + [name for name in weights if name.lower() not in known and ShardSet.of(name) in sets]
    else:
        files = _choose_unlisted(model_dir, weights)
        if listed:
            remarks.append(f"{INDEX_FILE} lists {shorten(listed)}, not there, and is not used")
            places = {}
        elif len(files) > 1:
            remarks.append(f"{INDEX_FILE} is missing: {shorten(files)} are read without it")
    read = {name.lower() for name in files}
    if unread := [name for name in weights if name.lower() not in read]:
        remarks.append(f"not read beside {files[0]}: {shorten(unread)}")
    return _Choice(files, places, remarks)


def _choose_unlisted(model_dir: Path, weights: list[str]) -> list[str]:
    """The single file, else the only complete set of shards, else all files."""
    if demo := [name for name in weights if _DEMO_SHARD.fullmatch(name)]:
        raise ValueError(
            f"{model_dir} has {shorten(demo)}, which DeepSeek's convert.py wrote for its own code: give the directory "
            "of the checkpoint that they were made from"
        )
    weights = [name for name in weights if not name.lower().startswith(_OTHER_FORMS)] or weights
    return [name for name in weights if name.lower() == SINGLE_FILE] or _choose_set(model_dir, weights)


def _choose_set(model_dir: Path, weights: list[str]) -> list[str]:
    """All files of the only set of shards that is complete, or of the only one; all weights if there are no sets."""
    sets = sorted({found for name in weights if (found := ShardSet.of(name))})
    if not sets:
        return weights
    complete = [one for one in sets if set(one.files(weights)) <= set(weights)] or sets
    if len(complete) > 1:
        raise ValueError(
            f"{model_dir} has no {INDEX_FILE} and several sets of shards, "
            f"{shorten([one.files(weights)[0] for one in complete])}: remove all but one, or download the index"
        )
    return complete[0].files(weights)


def _listed_for(file: str, places: Mapping[str, str]) -> str:
    """Reason for which a missing file was looked for, as a clause."""
    held = next((name for name, place in places.items() if place == file), None)
    return "; download it" if held is None else f"; {INDEX_FILE} says it holds {held}: download it"


def _merge(headers: Mapping[str, SafetensorsHeader], places: Mapping[str, str]) -> FoundTensors:
    """The tensors of all files; an index decides between two files that hold a tensor."""
    found: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
    for file, header in headers.items():
        for name, entry in header.tensors.items():
            found[name][file] = entry
    entries = {}
    repeated = []
    for name, files in found.items():
        if len(files) == 1:
            (entries[name],) = files.values()
        elif places.get(name) in files:
            entries[name] = files[places[name]]
        else:
            repeated.append(name)
    remarks = []
    if repeated:
        where = " and in ".join(found[repeated[0]])
        remarks.append(
            f"{len(repeated)} tensors are in several files, such as {repeated[0]} in {where}: remove those that do not "
            "belong there"
        )
    unsupported = {name: dtype for header in headers.values() for name, dtype in header.unsupported.items()}
    for name, dtype in list(unsupported.items())[:1]:
        remarks.append(f"{len(unsupported)} tensors have dtypes that are not supported, such as {name} ({dtype})")
    misplaced = [name for name, file in places.items() if file in headers and file not in found.get(name, {})]
    if moved := [name for name in misplaced if name in found]:
        remarks.append(f"{len(moved)} tensors are not in the files that {INDEX_FILE} says, such as {moved[0]}")
    if absent := [name for name in misplaced if name not in found and name not in unsupported]:
        remarks.append(
            f"{places[absent[0]]} does not hold {absent[0]}, as {INDEX_FILE} says; are files of two checkpoints mixed?"
        )
    return FoundTensors(entries, remarks)


def _is_basename(file: str) -> bool:
    """Whether `file` names something directly in a directory, on any system, and not the directory or its parent."""
    return file not in ("", ".", "..") and not any(letter in file for letter in "/\\:\0")
