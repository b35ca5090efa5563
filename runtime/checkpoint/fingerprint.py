"""The fingerprint of a checkpoint: equal for equal checkpoints, whichever rank or layout reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from .file_digests import DigestCache, file_digests
from .model_directory import CONFIG_FILE, find_file
from .safetensors_file import SafetensorsFile, TensorEntry


def compute_fingerprint(model_dir: Path, entries: Mapping[str, TensorEntry], cache: DigestCache) -> str:
    """SHA-256 (hex) over config.json, every tensor's name, dtype, shape and place, and every byte of the files.

    The bytes are hashed as `file_digests` says, which keeps what it computes in `cache`. ValueError when a file
    changed after its header was read: tensors that were read since then are those of the fingerprint.
    """
    files = {entry.path: entry.file for entry in entries.values()}
    digests = file_digests(sorted(files.values(), key=_path), cache)
    hashed = hashlib.sha256()
    _update(hashed, (find_file(model_dir, CONFIG_FILE) or model_dir / CONFIG_FILE).read_bytes())
    for name, entry in sorted(entries.items()):
        _update(hashed, name.encode())
        _update(hashed, f"{entry.dtype} {entry.shape} {entry.begin} {digests[entry.path]}".encode())
    return hashed.hexdigest()


def _path(file: SafetensorsFile) -> Path:
    return file.path


def _update(hashed: hashlib._Hash, part: bytes) -> None:
    """Add a part with its length, so that no two lists of parts hash the same."""
    hashed.update(len(part).to_bytes(8, "little"))
    hashed.update(part)
