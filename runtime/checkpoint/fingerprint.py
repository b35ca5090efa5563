"""The fingerprint of a checkpoint: equal for equal checkpoints, whoever reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from .safetensors_file import TensorEntry

_SAMPLE_BYTES = 4096


def fingerprint(model_dir: Path, entries: Mapping[str, TensorEntry]) -> str:
    """SHA-256 (hex) that tells checkpoints apart without reading them whole.

    Covers config.json, every tensor's name, dtype and shape, and of each file its size and the first and last 4 KiB
    of tensor data. Weights edited elsewhere in a file of the same size are not noticed.
    """
    hashed = hashlib.sha256()
    _update(hashed.update, [(model_dir / "config.json").read_bytes()])
    for name, entry in sorted(entries.items()):
        _update(hashed.update, [name.encode(), str(entry.dtype).encode(), repr(entry.shape).encode()])
    for path in sorted({entry.path for entry in entries.values()}):
        size = path.stat().st_size
        with path.open("rb") as file:
            data_start = 8 + int.from_bytes(file.read(8), "little")
            file.seek(data_start)
            head = file.read(_SAMPLE_BYTES)
            file.seek(max(data_start, size - _SAMPLE_BYTES))
            tail = file.read(_SAMPLE_BYTES)
        _update(hashed.update, [str(size).encode(), head, tail])
    return hashed.hexdigest()


def _update(update: Callable[[bytes], None], parts: Iterable[bytes]) -> None:
    """Feed `parts` to a hash with their lengths, so that no two lists of parts hash the same."""
    for part in parts:
        update(len(part).to_bytes(8, "little"))
        update(part)
