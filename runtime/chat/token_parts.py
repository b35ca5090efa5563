"""Token ids of an output to parts, while the output is generated."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Container, Sequence
from dataclasses import dataclass

from ..tokenization.tokenizer import Part, Special, Tokenizer


@dataclass(frozen=True, slots=True)
class _Piece:
    part: Part | None
    """None for a token that is left out."""
    text: str
    """Its characters in the engine's text."""


class TokenParts:
    """The parts of one output: each added token as a `Special`, whether or not the engine's text shows it.

    Parts never go beyond the engine's text, which may be behind the tokens (characters that may begin a stop string are
    held back) and may end before they do (a stop string takes its characters back):

        tokens         Hel | lo | </think> | a S | TOP      (stop string "STOP")
        engine's text  Hello</think>a_                      (num_chars = 15)
        parts          "Hello", Special("</think>"), "a "

    `num_chars` is the length of the engine's text so far, from its beginning. An added token that the text skips has no
    length, and is taken where the text has come to its place; one that the text has in part is text as far as it is
    there. Apart from skipped added tokens and end tokens, the parts spell the engine's text.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, end_token_ids: Container[int] = ()
    ) -> None:
        """`skip_special_tokens` is the engine's setting. `end_token_ids` end a turn and are left out."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._end_token_ids = end_token_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._needs_separator = False
        self._pieces: deque[_Piece] = deque()
        self._num_taken = 0

    def append(self, token_ids: Sequence[int], num_chars: int) -> list[Part]:
        """Take the next tokens; returns the parts that are certain by now."""
        for token_id in token_ids:
            self._decode(token_id)
        return self._take(num_chars)

    def finish(self, num_chars: int) -> list[Part]:
        """End the output, whose whole text has `num_chars` characters; returns the last parts."""
        self._add_text(self._decoder.decode(b"", final=True))
        parts = self._take(num_chars)
        if self._pieces and isinstance(self._pieces[0].part, Special):
            parts.append(self._pieces[0].text[: num_chars - self._num_taken])
        return [p for p in parts if p]

    def _decode(self, token_id: int) -> None:
        data = self._tokenizer.token_bytes(token_id, self._skip_special_tokens)
        text = ""
        if data is not None:
            separator = self._tokenizer.separator if self._needs_separator else b""
            self._needs_separator = True
            text = self._decoder.decode(separator + data)
        special = self._tokenizer.special_text(token_id)
        if special is None:
            self._add_text(text)
            return
        own = special if data is not None else ""
        assert text.endswith(own)
        self._add_text(text[: len(text) - len(own)])
        self._pieces.append(_Piece(None if token_id in self._end_token_ids else Special(special), own))

    def _add_text(self, text: str) -> None:
        if text:
            self._pieces.append(_Piece(text, text))

    def _take(self, num_chars: int) -> list[Part]:
        """Remove what lies within the first `num_chars` characters: whole tokens, and any part of other text."""
        parts: list[Part] = []
        while self._pieces:
            piece = self._pieces[0]
            num_left = num_chars - self._num_taken
            if len(piece.text) > num_left:
                if isinstance(piece.part, str) and num_left:
                    head, tail = piece.text[:num_left], piece.text[num_left:]
                    parts.append(head)
                    self._pieces[0] = _Piece(tail, tail)
                    self._num_taken = num_chars
                break
            self._pieces.popleft()
            self._num_taken += len(piece.text)
            if piece.part is not None:
                parts.append(piece.part)
        return parts
