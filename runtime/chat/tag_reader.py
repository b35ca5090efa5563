"""Reads an output as text and tags. A tag may be an added token, plain text, or text around an added token."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from ..tokenization.tokenizer import Part

# Decoded text has no surrogates, so each can stand for an added token.
_FIRST_SURROGATE = 0xD800
_WHITE_SPACE = re.compile(r"\s*")


class TagSet:
    """The tags that count in one place. None is the beginning of another or within another, except at its end."""

    def __init__(self, tags: Sequence[str]) -> None:
        assert not any(a in b[:-1] for a in tags for b in tags), tags
        self.pattern = re.compile("|".join(map(re.escape, tags)) if tags else r"(?!)")
        self.prefixes = frozenset(tag[:n] for tag in tags for n in range(1, len(tag)))
        """All that an unfinished tag can look like."""
        self.max_prefix = max(map(len, self.prefixes), default=0)
        self.first_characters = re.compile(f"[{re.escape(''.join({tag[0] for tag in tags}))}]" if tags else r"(?!)")


@functools.lru_cache(maxsize=256)  # every output of a grammar has the same few
def _tag_set(tags: tuple[str, ...]) -> TagSet:
    return TagSet(tags)


class TagReader:
    """Reads parts from the front, with the tags that count at each moment.

    Tags are made of text and of `tokens`, added tokens of the tokenizer. In a tag these match a `Special` only, and the
    same characters as text are text. Without tokens, a `Special` is read as its text.
    A method returns None where the rest of the input decides; nothing but the start of a tag is held back.
    """

    def __init__(self, tokens: Sequence[str] = ()) -> None:
        self._code_of_token = {token: chr(_FIRST_SURROGATE + i) for i, token in enumerate(tokens)}
        self._token_of_code = {ord(code): token for token, code in self._code_of_token.items()}
        self._buffer = ""
        self._position = 0
        self._is_finished = False

    def tag_set(self, *tags: str) -> TagSet:
        """Tags to read with, by their characters."""
        encoded = []
        for tag in tags:
            for token, code in self._code_of_token.items():
                tag = tag.replace(token, code)
            encoded.append(tag)
        return _tag_set(tuple(encoded))

    def is_token(self, tag: str) -> bool:
        """Whether a tag is an added token, and so never text."""
        return tag in self._code_of_token

    def push(self, parts: Sequence[Part]) -> None:
        """Add input."""
        texts = [p if isinstance(p, str) else self._code_of_token.get(p.text, p.text) for p in parts]
        self._buffer = self._buffer[self._position :] + "".join(texts)
        self._position = 0

    def finish(self) -> None:
        """End the input, which decides what was held back: it is text."""
        self._is_finished = True

    def read(self, tags: TagSet) -> tuple[str, str] | None:
        """Text that precedes the next tag, and the tag; ("some text", "") while it has not come."""
        start = self._position
        if start == len(self._buffer):
            return None
        if match := tags.pattern.search(self._buffer, start):
            self._position = match.end()
            return self._decode(self._buffer[start : match.start()]), self._decode(match.group())
        self._position = len(self._buffer) - self._num_held(tags)
        if self._position == start:
            return None
        return self._decode(self._buffer[start : self._position]), ""

    def read_space(self) -> str:
        """White space that comes next, as far as it is there."""
        match = _WHITE_SPACE.match(self._buffer, self._position)
        assert match is not None
        self._position = match.end()
        return match.group()

    def match(self, tags: TagSet) -> str | None:
        """The tag that comes next, or "" for none of them."""
        if match := tags.pattern.match(self._buffer, self._position):
            self._position = match.end()
            return self._decode(match.group())
        rest = self._buffer[self._position : self._position + tags.max_prefix + 1]
        is_undecided = not self._is_finished and (not rest or rest in tags.prefixes)
        return None if is_undecided else ""

    def _num_held(self, tags: TagSet) -> int:
        """Length of the longest end of the input that may begin a tag."""
        if self._is_finished:
            return 0
        start = max(self._position, len(self._buffer) - tags.max_prefix)
        for match in tags.first_characters.finditer(self._buffer, start):
            if self._buffer[match.start() :] in tags.prefixes:
                return len(self._buffer) - match.start()
        return 0

    def _decode(self, text: str) -> str:
        return text.translate(self._token_of_code) if self._token_of_code else text
