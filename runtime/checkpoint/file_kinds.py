"""Recognises files that are not what their names say, so that an error can say what they are and what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

_HEAD_BYTES = 1024
_MAX_QUOTED_BYTES = 200
_AGAIN = "download it again"
_MAGIC = (
    (b"PK\x03\x04", "is a zip archive, as pickled PyTorch weights are; convert the weights to safetensors"),
    (b"\x80\x02", "is a Python pickle, which can hold code; convert the weights to safetensors"),
    (b"\x89HDF", "is an HDF5 file; convert the weights to safetensors"),
    (b"GGUF", "is a GGUF file of llama.cpp; use the model's safetensors files"),
    (b"\x1f\x8b", "is compressed with gzip; decompress it"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd; decompress it"),
    (b"\xfd7zXZ\x00", "is compressed with xz; decompress it"),
)


def describe_file(path: Path) -> str | None:
    """Describe a file that cannot be used and what to do, as a phrase to follow its name; None if it looks right.

    Recognises Git LFS and git-annex pointers, unfinished downloads, answers of a server and files of other formats.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head:
        return f"is empty: its download did not finish; {_AGAIN}"
    if not any(head):
        return f"begins with zeros: its download did not finish; {_AGAIN}"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith((b"version https://git-lfs.github.com/", b"version https://hawser.github.com/")):
        size = re.search(rb"size (\d+)", text)
        stands_for = f" to a file of {size[1].decode()} bytes" if size else ""
        return f"is a Git LFS pointer{stands_for}: run `git lfs pull` in {path.parent}, or download the file"
    if b"/annex/objects/" in text[:_MAX_QUOTED_BYTES]:
        return f"is a git-annex pointer: run `git annex get` in {path.parent}, or download the file"
    if text.lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<error")):
        return f"is a web page that a server sent instead of the file; {_AGAIN}, logged in if the model asks for it"
    for magic, description in _MAGIC:
        if head.startswith(magic):
            return description
    if (
        len(head) <= _MAX_QUOTED_BYTES
        and head.isascii()
        and head.decode().strip().isprintable()
        and text[:1] not in b"{["
    ):
        return f"holds only the text {head.decode().strip()!r}; {_AGAIN}"
    return None


def read_json(
    path: Path, max_bytes: int, *, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """Read a JSON file in UTF-8, with or without a byte order mark; a ValueError says what is wrong with it."""
    try:
        if path.stat().st_size > max_bytes:
            raise ValueError(f"{path} is larger than {max_bytes} bytes, which no such file is")
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=object_pairs_hook)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} {describe_file(path) or f'is not valid JSON ({error}); {_AGAIN}'}") from error
