"""Which input a job was started with, and whether it is still there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .files import InputFile


def input_fingerprint(files: Sequence[InputFile]) -> str:
    """Text that changes with the content of any file and with their order, not with their names."""
    fingerprints = [file.fingerprint() for file in files]
    if len(fingerprints) == 1:
        return fingerprints[0]
    return f"sha256:{hashlib.sha256(repr(fingerprints).encode()).hexdigest()}"


def recorded_files(files: Sequence[InputFile]) -> list[dict[str, Any]]:
    """The files of a job for run.json."""
    return [{"url": file.url, "num_bytes": file.num_bytes} for file in files]


def restrict_files(
    files: Sequence[InputFile], recorded: Sequence[Mapping[str, Any]], fingerprint: str, say: Callable[[str], None]
) -> list[InputFile] | None:
    """The files as they were when they were recorded, without what was appended and without new ones.

    None where nothing has come since, or where the recorded files are not what they were: then their `fingerprint`
    differs. `say` is told what is not read.
    """
    by_url = {file.url: file for file in files}
    if len(recorded) == len(files) == 1:
        by_url = {recorded[0]["url"]: files[0]}  # wherever it is now
    restricted: list[InputFile] = []
    for entry in recorded:
        file = by_url.get(entry["url"])
        if file is None or file.num_bytes < entry["num_bytes"]:
            return None
        restricted.append(replace(file, num_bytes=entry["num_bytes"]))
    if restricted == list(files) or input_fingerprint(restricted) != fingerprint:
        return None
    for file in restricted:
        if new_bytes := next(now.num_bytes for now in files if now.url == file.url) - file.num_bytes:
            say(f"{file.url} has grown by {new_bytes} bytes since the job was started: they are not read")
    if num_new := len(files) - len(restricted):
        say(f"{num_new} input files have come since the job was started: they are not read")
    return restricted
