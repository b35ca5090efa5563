"""White space around content, for every cut of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.runtime.chat.white_space import ContentHolder, SpaceHolder, StrippedContent, VerbatimContent

CALL = None
PIECES = st.lists(st.text(alphabet="a \n", max_size=3))
CONTENT = st.lists(st.text(alphabet="a \n", max_size=3) | st.just(CALL))


def written(holder: ContentHolder, content: list[str | None]) -> str:
    pieces = [holder.begin_call() if piece is None else holder.write(piece) for piece in content]
    return "".join(pieces) + holder.finish()


@given(PIECES)
def test_white_space_is_held_until_something_follows(pieces: list[str]) -> None:
    holder = SpaceHolder()
    given_so_far = released = ""
    for piece in pieces:
        given_so_far += piece
        released += holder.write(piece)
        assert released == given_so_far.rstrip()
    assert released + holder.take() == given_so_far


@given(CONTENT)
def test_stripped_content(content: list[str | None]) -> None:
    text = "".join(piece for piece in content if piece is not None)
    assert written(StrippedContent(), content) == (text.strip() if CALL in content else text)


@given(PIECES, PIECES)
def test_verbatim_content(before: list[str], after: list[str]) -> None:
    assert written(VerbatimContent(), list(before)) == "".join(before)
    text = "".join(before)
    assert written(VerbatimContent(), [*before, CALL]) == (text if text.strip() else "")
    if not text.strip():
        rest = "".join(after)
        assert written(VerbatimContent(), [*before, CALL, *after]).strip() == rest.strip()


def test_stripped_content_waits_only_if_it_begins_with_white_space() -> None:
    holder = StrippedContent()
    assert [holder.write(piece) for piece in ("a ", "b", "\n")] == ["a", " b", ""]
    holder = StrippedContent()
    assert [holder.write(piece) for piece in (" a", "b")] == ["", ""]
    assert [holder.begin_call(), holder.write(" c")] == ["ab", " c"]
