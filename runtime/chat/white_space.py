"""White space of an output that counts only with something else around it, while more of the text is to come."""

from __future__ import annotations

from typing import Protocol


class SpaceHolder:
    """Passes text on, and white space only when something else follows it."""

    def __init__(self) -> None:
        self._held: list[str] = []

    def write(self, text: str) -> str:
        """Add text; returns what goes on."""
        stripped = text.rstrip()
        if not stripped:
            self._held.append(text)
            return ""
        released = self.take() + stripped
        self._held.append(text[len(stripped) :])
        return released

    def take(self) -> str:
        """Return the white space held, and hold none."""
        held = "".join(self._held)
        self._held.clear()
        return held


class ContentHolder(Protocol):
    """Content on its way out. Each method returns what is certain by now."""

    def write(self, text: str) -> str:
        """Add text."""
        ...

    def begin_call(self) -> str:
        """Note a tool call."""
        ...

    def finish(self) -> str:
        """End the content."""
        ...


class VerbatimContent:
    """Content as it is, except that white space alone beside calls is no content."""

    def __init__(self) -> None:
        self._space = SpaceHolder()
        self._has_begun = False

    def write(self, text: str) -> str:
        if self._has_begun:
            return text
        released = self._space.write(text)
        if not released:
            return ""
        self._has_begun = True
        return released + self._space.take()

    def begin_call(self) -> str:
        self._space.take()
        return ""

    def finish(self) -> str:
        return self._space.take()


class StrippedContent:
    """Content without white space around it if there are calls, before or after it, and as it is if there are none.

    So content that begins with white space is held back as a whole until the first call or the end.
    """

    def __init__(self) -> None:
        self._space = SpaceHolder()
        self._undecided: list[str] = []
        """All that was written, white space at the end excepted, if it begins with white space."""
        self._has_begun = False
        self._has_calls = False

    def write(self, text: str) -> str:
        released = self._space.write(text)
        if not released or self._has_begun:
            return released
        if not self._has_calls and (self._undecided or released[0].isspace()):
            self._undecided.append(released)
            return ""
        self._has_begun = True
        return released.lstrip()

    def begin_call(self) -> str:
        self._has_calls = True
        undecided = self._take_undecided()
        self._has_begun |= bool(undecided)
        if not self._has_begun:
            self._space.take()
        return undecided.lstrip()

    def finish(self) -> str:
        return "" if self._has_calls else self._take_undecided() + self._space.take()

    def _take_undecided(self) -> str:
        undecided = "".join(self._undecided)
        self._undecided.clear()
        return undecided
