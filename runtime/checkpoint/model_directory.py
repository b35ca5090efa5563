"""Finds files of a model directory, and describes directories and files that are not what they should be."""

from __future__ import annotations

import os
from pathlib import Path

CONFIG_FILE = "config.json"
WEIGHT_SUFFIX = ".safetensors"

_NUM_NAMED = 5
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_UNFINISHED_SUFFIXES = (".incomplete", ".part", ".partial", ".aria2", ".crdownload", ".download", ".tmp")


def find_file(directory: Path, name: str) -> Path | None:
    """Path of the file of that name, else of the only one whose name differs in case; None if there is none.

    Some file systems and archives change the case of names. The file may be a link that leads nowhere.
    """
    path = directory / name
    if os.path.lexists(path):
        return path
    same = [other for other in list_names(directory) if other.lower() == name.lower()]
    return directory / same[0] if len(same) == 1 else None


def list_names(directory: Path) -> list[str]:
    """Names of everything in a directory, sorted; empty if it is none."""
    return sorted(os.listdir(directory)) if directory.is_dir() else []


def describe_missing(path: Path) -> str:
    """Say why there is no file at a path: a link that leads nowhere, a directory, an unfinished download, nothing."""
    if path.is_symlink():
        return f"{path} is a link to {os.readlink(path)}, which does not exist; download it again"
    if path.is_dir():
        return f"{path} is a directory, expected a file"
    parts = [name for name in list_names(path.parent) if name.startswith(path.name) and _is_unfinished(name)]
    unfinished = f" (the download of {parts[0]} did not finish)" if parts else ""
    return f"{path} does not exist{unfinished}"


def describe_directory(directory: Path) -> str:
    """Describe a path that was given as a model directory and lacks its files, as a last clause of an error."""
    if not directory.exists():
        return f"; {directory} does not exist"
    if not directory.is_dir():
        return f"; {directory} is a file: give the directory that holds it"
    names = list_names(directory)
    if not names:
        return f"; {directory} is empty"
    if snapshot := _find_snapshot(directory):
        return f"; {directory} is a folder of the Hugging Face cache: give {snapshot}"
    if unfinished := _find_unfinished(directory):
        return f"; the download of {unfinished} did not finish: download the model again"
    if pickled := [name for name in names if name.endswith(_PICKLED_SUFFIXES)]:
        return f"; {shorten(pickled)} can hold code and is not read: convert the weights to safetensors"
    if gguf := [name for name in names if name.lower().endswith(".gguf")]:
        return f"; {shorten(gguf)} {'is' if len(gguf) == 1 else 'are'} for llama.cpp: use the safetensors files"
    if below := [name for name in names if (directory / name / CONFIG_FILE).is_file()]:
        return f"; did you mean {directory / below[0]}?"
    return "; is it a model directory?"


def shorten(items: list[str]) -> str:
    """The first few of a list of names, for an error message."""
    return ", ".join(items[:_NUM_NAMED]) + (", ..." if len(items) > _NUM_NAMED else "")


def _find_snapshot(directory: Path) -> Path | None:
    """Path of a downloaded revision in a folder such as models--deepseek-ai--DeepSeek-V3."""
    snapshots = directory / "snapshots"
    found = [snapshots / name for name in list_names(snapshots) if find_file(snapshots / name, CONFIG_FILE)]
    return found[0] if found else None


def _is_unfinished(name: str) -> bool:
    return name.lower().endswith(_UNFINISHED_SUFFIXES)


def _find_unfinished(directory: Path) -> str | None:
    for folder in (directory, directory / ".cache" / "huggingface" / "download"):
        for name in list_names(folder):
            if _is_unfinished(name):
                return name
    return None
