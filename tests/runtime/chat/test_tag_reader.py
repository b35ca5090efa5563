"""Text and tags of an input that comes in parts."""

from __future__ import annotations

from shoal.runtime.chat.tag_reader import TagReader
from shoal.runtime.tokenization.tokenizer import Special


def test_text_up_to_a_tag_and_the_tag() -> None:
    reader = TagReader()
    tags = reader.tag_set("<a>", "</a>")
    reader.push(["x<a>y</a", ">z"])
    assert [reader.read(tags) for _ in range(4)] == [("x", "<a>"), ("y", "</a>"), ("z", ""), None]


def test_only_the_longest_beginning_of_a_tag_is_held_back() -> None:
    reader = TagReader()
    tags = reader.tag_set("<<a>", '">')
    reader.push(['x"<<'])
    assert reader.read(tags) == ('x"', "")
    assert reader.read(tags) is None
    reader.push(["<"])
    assert reader.read(tags) == ("<", "")
    reader.push(["a>"])
    assert reader.read(tags) == ("", "<<a>")


def test_a_tag_that_ends_like_another_one_is_found_whole() -> None:
    reader = TagReader()
    tags = reader.tag_set('">', '" b="c">')
    reader.push(['a" b="c'])
    assert reader.read(tags) == ("a", "")
    reader.push(['">d">'])
    assert [reader.read(tags) for _ in range(2)] == [("", '" b="c">'), ("d", '">')]


def test_tags_may_change_while_text_is_held_back() -> None:
    reader = TagReader()
    reader.push(["x<a"])
    assert reader.read(reader.tag_set("<a>")) == ("x", "")
    assert reader.read(reader.tag_set("<b>")) == ("<a", "")


def test_the_end_makes_text_of_what_was_held_back() -> None:
    reader = TagReader()
    tags = reader.tag_set("<a>")
    reader.push(["<a"])
    assert (reader.read(tags), reader.match(tags)) == (None, None)
    reader.finish()
    assert (reader.match(tags), reader.read(tags), reader.read(tags)) == ("", ("<a", ""), None)


def test_match_takes_a_tag_at_the_front_only() -> None:
    reader = TagReader()
    tags = reader.tag_set("<a>")
    assert reader.match(tags) is None
    reader.push([" \n<"])
    assert reader.match(tags) == ""
    assert reader.read_space() == " \n"
    assert reader.match(tags) is None
    reader.push(["a>b"])
    assert reader.match(tags) == "<a>"
    assert reader.match(tags) == ""
    assert reader.read(tags) == ("b", "")


def test_without_tags_all_is_text() -> None:
    reader = TagReader()
    reader.push(["a<", Special("b")])
    assert reader.read(reader.tag_set()) == ("a<b", "")
    assert reader.read(reader.tag_set()) is None


def test_tokens_are_tags_and_their_text_is_text() -> None:
    reader = TagReader(["<a>"])
    tags = reader.tag_set("<a>", "<b>")
    reader.push(["<a><b>", Special("<a>"), Special("<b>"), Special("<c>"), "d"])
    assert [reader.read(tags) for _ in range(4)] == [("<a>", "<b>"), ("", "<a>"), ("", "<b>"), ("<c>d", "")]


def test_a_tag_around_a_token_needs_the_token() -> None:
    reader = TagReader(["|T|"])
    tags = reader.tag_set("<|T|a>")
    reader.push(["<|T|a><"])
    assert reader.read(tags) == ("<|T|a>", "")
    reader.push([Special("|T|")])
    assert reader.read(tags) is None
    reader.push(["a>b", Special("|T|")])
    assert [reader.read(tags) for _ in range(2)] == [("", "<|T|a>"), ("b|T|", "")]
