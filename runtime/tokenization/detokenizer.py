"""Token ids to text one at a time, with stop strings; the cost is linear in the output's length."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from .tokenizer import Tokenizer


class IncrementalDetokenizer:
    """The text of one continuation while it is generated.

    `text` only ever grows: the bytes of an unfinished character, and characters that may turn out to begin a stop
    string, are held back until the next tokens decide or `finish` is called. After `finish`, and with no stop string
    met, `text` is `tokenizer.decode` of all tokens. Without a tokenizer the text stays empty.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        stop_after_token_id: int | None = None,
    ) -> None:
        """Stop strings need a tokenizer (ValueError).

        They count where they end after the first `min_tokens` tokens and, with `stop_after_token_id`, where they begin
        after the first such token.
        """
        if stop and tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and the model directory has no tokenizer.json")
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._include_stop = include_stop_str_in_output
        self._skip_special_tokens = skip_special_tokens
        self._min_tokens = min_tokens
        self._stop_after_token_id = stop_after_token_id
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._context_length = max(map(len, self._stop), default=1) - 1
        self._num_tokens = 0
        self._needs_separator = False
        self._released: list[str] = []
        self._context = ""  # the last characters decoded, where a stop string may have begun
        self._num_held = 0  # how many of them are not released yet
        self._closed = False

    @property
    def text(self) -> str:
        """Everything decided so far; final once a stop string was met or `finish` was called."""
        self._released = ["".join(self._released)]
        return self._released[0]

    def append(self, token_id: int) -> str | None:
        """Take the next token; returns the stop string that it completes, if any, and then the text is final.

        Of several, the one that begins first in the text; of those, the one that was given first. The text ends before
        it, or after it with `include_stop_str_in_output`.
        """
        assert not self._closed, "append after the end"
        self._num_tokens += 1
        new = self._decode(token_id)
        if self._stop_after_token_id is not None:
            self._released.append(new)
            if token_id == self._stop_after_token_id:
                self._stop_after_token_id = None
            return None
        window = self._context + new
        if self._num_tokens > self._min_tokens and (match := self._find_stop(window)):
            start, stop = match
            end = start + len(stop) if self._include_stop else start
            self._release(window, end)
            self._closed = True
            return stop
        num_held = 0 if self._include_stop else self._length_of_possible_stop(window)
        self._release(window, len(window) - num_held)
        self._context = window[max(0, len(window) - self._context_length) :]
        self._num_held = num_held
        return None

    def finish(self) -> None:
        """Release what is held back, the output having ended otherwise; an unfinished character becomes U+FFFD."""
        if not self._closed:
            self._release(self._context + self._decoder.decode(b"", final=True), None)
            self._closed = True

    def _decode(self, token_id: int) -> str:
        if self._tokenizer is None:
            return ""
        data = self._tokenizer.token_bytes(token_id, self._skip_special_tokens)
        if data is None:
            return ""
        separator = self._tokenizer.separator if self._needs_separator else b""
        self._needs_separator = True
        return self._decoder.decode(separator + data)

    def _find_stop(self, window: str) -> tuple[int, str] | None:
        """Start and text of the first stop string of `window` that ends in its new characters."""
        best: tuple[int, str] | None = None
        for stop in self._stop:
            start = window.find(stop, max(0, len(self._context) - len(stop) + 1))
            if start >= 0 and (best is None or start < best[0]):
                best = start, stop
        return best

    def _length_of_possible_stop(self, window: str) -> int:
        """Length of the longest suffix of `window` that is a prefix of a stop string."""
        longest = 0
        for stop in self._stop:
            start = window.find(stop[0], max(0, len(window) - len(stop) + 1))
            while 0 <= start < len(window) - longest:
                if stop.startswith(window[start:]):
                    longest = len(window) - start
                    break
                start = window.find(stop[0], start + 1)
        return longest

    def _release(self, window: str, end: int | None) -> None:
        """Move `window[:end]` to the text, less what was released before."""
        released = len(self._context) - self._num_held
        assert end is None or end >= released
        self._released.append(window[released:end])


class TokenOffsets:
    """Positions of tokens in the text of an output, while it is generated."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_chars = 0
        self._separator = b""

    def append(self, token_id: int) -> int:
        """The position in `tokenizer.decode` of all tokens of the character in which this one's bytes begin."""
        data = self._tokenizer.token_bytes(token_id, self._skip_special_tokens)
        if data is not None:
            self._num_chars += len(self._decoder.decode(self._separator))
            self._separator = self._tokenizer.separator
        if not data:
            return self._num_chars
        first = self._decoder.decode(data[:1])
        is_pending = self._decoder.getstate()[0] != b""
        # The first byte completes a character, is one, or waits for more; before it, broken bytes may become U+FFFD.
        offset = self._num_chars + max(0, len(first) - (0 if is_pending else 1))
        self._num_chars += len(first) + len(self._decoder.decode(data[1:]))
        return offset
