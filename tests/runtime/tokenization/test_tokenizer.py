"""Encoding never turns a user's text into special tokens; decoding token by token equals decoding at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from shoal.runtime.tokenization.byte_tokenizer import write_byte_tokenizer
from shoal.runtime.tokenization.tokenizer import (
    ASSISTANT,
    BOS,
    EOS,
    THINK_END,
    THINK_START,
    TOOL_SEP,
    USER,
    Part,
    Special,
    Tokenizer,
    read_eos_token_ids,
)


def added_token(token_id: int, content: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, "special": special, **flags}


def byte_spec(directory: Path) -> dict[str, Any]:
    write_byte_tokenizer(directory / "tokenizer.json")
    spec: dict[str, Any] = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    return spec


def word_spec() -> dict[str, Any]:
    words = ["<s>", "</s>", "<pad>", "t3", "t4", "t5"]
    return {
        "version": "1.0",
        "added_tokens": [added_token(i, w, True) for i, w in enumerate(words[:3])],
        "normalizer": None,
        "post_processor": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)}, "unk_token": "<pad>"},
    }


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(byte_spec(tmp_path_factory.mktemp("bytes")), [1])


def test_the_byte_tokenizer(tmp_path: Path) -> None:
    assert write_byte_tokenizer(tmp_path / "tokenizer.json") == 272
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer is not None
    assert tokenizer.vocab_size == 272
    assert tokenizer.encode("Hi é\n\0") == [3 + b for b in "Hi é\n\0".encode()]
    assert [tokenizer.special_id(t) for t in (BOS, EOS, THINK_START, USER, TOOL_SEP)] == [0, 1, 259, 261, 271]
    assert tokenizer.special_id("H") is None
    assert tokenizer.encode("") == []
    assert [tokenizer.token_bytes(3 + b) for b in range(256)] == [bytes([b]) for b in range(256)]


def test_rendered_prompts_mix_text_and_special_tokens(byte_tokenizer: Tokenizer) -> None:
    parts: list[Part] = [Special(BOS), "a", "b", Special(USER), Special(THINK_END), USER]
    text = [3 + b for b in USER.encode()]
    assert byte_tokenizer.encode_rendered(parts) == [0, 100, 101, 261, 260, *text]
    assert byte_tokenizer.encode_rendered([]) == []
    with pytest.raises(ValueError, match="no token <nope>"):
        byte_tokenizer.encode_rendered([Special("<nope>")])


ADDED = [BOS, EOS, USER, ASSISTANT, THINK_START, THINK_END, TOOL_SEP]


@given(st.lists(st.sampled_from([*ADDED, " ", "<", "think>", "x"]) | st.text(max_size=3)))
def test_no_text_gives_a_special_token(byte_tokenizer: Tokenizer, pieces: list[str]) -> None:
    text = "".join(pieces)
    ids = byte_tokenizer.encode(text)
    assert all(3 <= i < 259 for i in ids)
    assert byte_tokenizer.decode(ids) == text


@pytest.mark.parametrize("merges", [["< s", "<s >", "a b"], [["<", "s"], ["<s", ">"], ["a", "b"]]])
@pytest.mark.parametrize("ignore_merges", [False, True])  # True looks whole words up in the vocabulary first
def test_merges_and_vocabulary_cannot_produce_an_added_token(
    tmp_path: Path, merges: list[Any], ignore_merges: bool
) -> None:
    spec = byte_spec(tmp_path)
    spec["added_tokens"] = [added_token(260, "<s>", True)]
    spec["model"]["vocab"] |= {"<s": 259, "<s>": 260, "ab": 261}
    spec["model"] |= {"merges": merges, "ignore_merges": ignore_merges}
    tokenizer = Tokenizer(spec)
    assert tokenizer.special_id("<s>") == 260
    assert tokenizer.encode("<s>") == [259, 3 + ord(">")]
    assert tokenizer.encode("<s>ab") == [259, 3 + ord(">"), 261]
    assert tokenizer.decode([259, 261]) == "<sab"


def test_neither_truncation_nor_a_template_changes_the_prompt(tmp_path: Path) -> None:
    spec = byte_spec(tmp_path)
    spec["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {BOS: {"id": BOS, "ids": [0], "tokens": [BOS]}},
    }
    assert Tokenizer(spec).encode("hello") == [3 + b for b in b"hello"]


def test_word_level() -> None:
    tokenizer = Tokenizer(word_spec())
    assert tokenizer.encode("t3 t5  t4") == [3, 5, 4]
    # Unknown words, and words that look like special tokens, are the unknown-word token.
    assert tokenizer.encode("t3 what </s> <s> <pad>") == [3, 2, 2, 2, 2]
    assert tokenizer.encode_rendered([Special("<s>"), "t3", Special("</s>")]) == [0, 3, 1]
    assert tokenizer.decode([0, 3, 5]) == "t3 t5"
    assert tokenizer.decode([0, 3, 5], skip_special_tokens=False) == "<s> t3 t5"
    assert tokenizer.vocab_size == 6


def test_skipping_special_tokens_keeps_the_markup(byte_tokenizer: Tokenizer) -> None:
    ids = [0, 261, 100, 262, 260, 101, 1]
    assert byte_tokenizer.decode(ids) == f"{USER}a{ASSISTANT}{THINK_END}b"
    assert byte_tokenizer.decode(ids, skip_special_tokens=False) == f"{BOS}{USER}a{ASSISTANT}{THINK_END}b{EOS}"
    assert byte_tokenizer.decode([100, 5000, 101]) == "ab"  # a model may have more rows than the tokenizer has tokens
    assert byte_tokenizer.token_bytes(5000) is None


@given(st.lists(st.integers(0, 280)), st.booleans())
def test_token_bytes_add_up_to_decode(byte_tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    pieces = [b for i in ids if (b := byte_tokenizer.token_bytes(i, skip)) is not None]
    assert b"".join(pieces).decode(errors="replace") == byte_tokenizer.decode(ids, skip)


@given(st.lists(st.integers(0, 8)), st.booleans())
def test_token_bytes_add_up_to_decode_for_words(ids: list[int], skip: bool) -> None:
    tokenizer = Tokenizer(word_spec())
    pieces = [b for i in ids if (b := tokenizer.token_bytes(i, skip)) is not None]
    assert tokenizer.separator.join(pieces).decode() == tokenizer.decode(ids, skip)


def test_a_lone_surrogate_is_refused(byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"lone surrogate U\+D83D at character 2"):
        byte_tokenizer.encode("ab\ud83d")


def test_end_of_sequence_ids(tmp_path: Path) -> None:
    def write(name: str, content: dict[str, Any]) -> None:
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")

    def ids() -> tuple[int, ...]:
        tokenizer = Tokenizer.from_pretrained(tmp_path)
        assert tokenizer is not None
        return tokenizer.eos_token_ids

    write_byte_tokenizer(tmp_path / "tokenizer.json")
    write("tokenizer_config.json", {})
    assert ids() == read_eos_token_ids(tmp_path) == ()
    write("config.json", {"text_config": {"eos_token_id": [6, 5]}})
    assert ids() == read_eos_token_ids(tmp_path) == (5, 6)
    write("config.json", {"eos_token_id": 7, "text_config": {"eos_token_id": 5}})
    assert ids() == read_eos_token_ids(tmp_path) == (7,)
    write("generation_config.json", {"eos_token_id": [9, 8, 9]})
    assert ids() == read_eos_token_ids(tmp_path) == (8, 9)
    write("tokenizer_config.json", {"eos_token": EOS})
    assert ids() == (1, 8, 9)
    write("tokenizer_config.json", {"eos_token": {"__type": "AddedToken", "content": EOS}})
    assert ids() == (1, 8, 9)
    write("generation_config.json", {"eos_token_id": "1"})
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id"):
        ids()


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": USER, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {USER: {"id": USER, "ids": [261], "tokens": [USER]}},
}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


@pytest.mark.parametrize("post_processor", [TEMPLATE, {"type": "Sequence", "processors": [BYTE_LEVEL, TEMPLATE]}])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"add_bos_token": True, "bos_token": BOS},
        {"add_bos_token": False, "bos_token": BOS},
        {"add_eos_token": True, "bos_token": BOS, "eos_token": EOS},
    ],
)
def test_a_template_of_tokenizer_json_is_used_as_in_transformers(
    tmp_path: Path, settings: dict[str, Any], post_processor: dict[str, Any]
) -> None:
    spec = byte_spec(tmp_path) | {"post_processor": post_processor}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer is not None
    reference = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Hi", ""):
        assert tokenizer.encode_prompt(text) == reference(text)["input_ids"]
    assert tokenizer.encode_prompt(USER) == [261, *(3 + b for b in USER.encode())]


@pytest.mark.parametrize("post_processor", [None, BYTE_LEVEL])
@pytest.mark.parametrize(
    ("settings", "before", "after"),
    [
        ({}, [0], []),
        ({"add_bos_token": None, "bos_token": USER}, [0], []),
        ({"add_bos_token": True}, [], []),
        ({"add_bos_token": True, "bos_token": USER}, [261], []),
        ({"add_bos_token": True, "bos_token": {"__type": "AddedToken", "content": USER}}, [261], []),
        ({"add_bos_token": True, "bos_token": "a"}, [100], []),
        ({"add_bos_token": False, "bos_token": BOS}, [], []),
        ({"add_eos_token": True, "bos_token": BOS, "eos_token": EOS}, [], [1]),
        ({"add_bos_token": True, "add_eos_token": True, "bos_token": EOS, "eos_token": BOS}, [1], [0]),
    ],
)
def test_a_prompt_starts_and_ends_as_tokenizer_config_says(
    tmp_path: Path,
    settings: dict[str, Any],
    before: list[int],
    after: list[int],
    post_processor: dict[str, Any] | None,
) -> None:
    tokenizer = Tokenizer(byte_spec(tmp_path) | {"post_processor": post_processor}, settings=settings)
    assert tokenizer.encode_prompt("ab") == [*before, 100, 101, *after]
    assert tokenizer.encode("ab") == [100, 101]


def test_a_prompt_starts_with_deepseeks_token_where_no_file_says_anything(tmp_path: Path) -> None:
    assert Tokenizer(byte_spec(tmp_path)).encode_prompt("a") == [0, 100]
    assert Tokenizer(word_spec()).encode_prompt("t3") == [3]


def test_sentence_tokens_of_special_tokens_map(tmp_path: Path) -> None:
    def write(name: str, content: dict[str, Any]) -> None:
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")

    write_byte_tokenizer(tmp_path / "tokenizer.json")
    write("special_tokens_map.json", {"eos_token": {"content": USER}, "bos_token": EOS})
    write("tokenizer_config.json", {"add_bos_token": True, "bos_token": BOS})
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer is not None
    assert (tokenizer.eos_token_ids, tokenizer.encode_prompt("a")) == ((261,), [1, 100])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eos_token": "<nope>"}, "tokenizer_config.json has eos_token '<nope>', which tokenizer.json lacks"),
        ({"bos_token": 5, "add_bos_token": True}, "bos_token 5"),
        ({"add_bos_token": "yes"}, "add_bos_token of tokenizer_config.json must be true or false"),
    ],
)
def test_sentence_tokens_that_the_tokenizer_lacks_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer(byte_spec(tmp_path), settings=settings)


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    assert Tokenizer.from_pretrained(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        ("{}", "model None"),
        ('{"model": {"type": "Unigram"}}', "Unigram"),
        ('{"model": {"type": "BPE"}, "decoder": {"type": "Metaspace"}}', "Metaspace"),
        ('{"model": {"type": "BPE"}}', "cannot be used"),
    ],
)
def test_a_broken_or_unsupported_tokenizer_names_the_file(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_pretrained(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(error.value)
