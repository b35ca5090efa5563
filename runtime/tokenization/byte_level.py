"""Bytes as characters, for vocabularies that are written as text."""

from __future__ import annotations


def byte_alphabet() -> list[str]:
    """The character by which byte-level vocabularies write each byte: itself if printable, else U+0100 onwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]
