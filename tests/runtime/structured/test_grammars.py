"""Forms of answers, compiled by llguidance: which texts are answers, and what is refused before a request is taken."""

from __future__ import annotations

import builtins
import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from shoal.runtime.structured.constraint import ConstraintError
from shoal.runtime.structured.structured_outputs import MAX_CACHED_GRAMMARS, StructuredOutputs
from shoal.runtime.tokenization.byte_level import byte_alphabet
from shoal.runtime.tokenization.tokenizer import THINK_END, TOOL_CALL_BEGIN, Tokenizer
from shoal.runtime.types import SamplingParams
from tests.support.structured import EOS, VOCAB, accepts, allows, byte_tokenizer, constraint, constraints, tokens

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def structured(tokenizer: Tokenizer) -> StructuredOutputs:
    return StructuredOutputs(tokenizer, VOCAB)


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        (
            {"json": PERSON},
            ['{"name":"Bo","age":3}', '{"name": "ü☃", "age": 30}', '{"name":"\\n\\"","age":0}'],
            ['{"name":"Bo"}', '{"name":"Bo","age":-1}', '{"age":3,"name":"Bo"}', '{"name":"Bo","age":3,"x":1}', "{}"],
        ),
        ({"json": json.dumps({"enum": [1, "a", None]})}, ["1", '"a"', "null"], ["2", "a", "1 ", " 1"]),
        ({"json": {"type": "array", "items": {"const": 0}, "maxItems": 2}}, ["[]", "[0, 0]", "[0,0]"], ["[0,0,0]"]),
        ({"json_object": True}, ["{}", '{"a": [1, {"b": null}], "c": -1.5e3}'], ["[]", "1", '{"a": }', "{a: 1}"]),
        ({"regex": r"[a-c]{2,3}/\d"}, ["ab/1", "abc/9"], ["a/1", "abcd/1", "ab/", "xab/1"]),
        ({"choice": ["yes", "yes sir", 'no "way"', "jå\n"]}, ["yes", "yes sir", 'no "way"', "jå\n"], ["y", "no"]),
        ({"grammar": 'start: "(" start ")" | "x"'}, ["x", "((x))"], ["(x", "x)", "()"]),
    ],
)  # fmt: skip
def test_which_texts_are_answers(
    structured: StructuredOutputs, form: Mapping[str, Any], good: list[str], bad: list[str]
) -> None:
    assert [text for text in good if not accepts(structured, form, text)] == []
    assert [text for text in bad if accepts(structured, form, text)] == []


def test_a_weak_model_cannot_write_white_space_for_ever(structured: StructuredOutputs) -> None:
    """At most one space in a row outside of strings, and no other white space, also for schemas in a grammar."""
    for form in (
        {"json": {"type": "object"}},
        {"json_object": True},
        {"json": {"type": "array"}},
        {"grammar": 'start: %json {"type": ["array", "object"]}'},
    ):
        for text in (
            '{ "a":1}',
            '{"a" :1}',
            '{"a":  1}',
            '{"a":\n1}',
            '{"a":1 }',
            '{"a":1,  "b":1}',
            "[1,  2]",
            "[ 1]",
        ):
            assert not accepts(structured, form, text), (form, text)
    assert accepts(structured, {"grammar": 'start: %json {"type": "array"}'}, "[1, 2,3]")


def test_what_follows_is_exactly_what_the_form_allows(structured: StructuredOutputs) -> None:
    one = constraint(structured, {"choice": ["no", "not", "yes"]})
    assert allows(one, []) == set(tokens("ny"))
    assert allows(one, tokens("n")) == set(tokens("o"))
    assert allows(one, tokens("no")) == {EOS, *tokens("t")}
    assert allows(one, tokens("not")) == {EOS}
    positive, zero = constraints(structured, {"json": {"type": "integer"}}, stop_token_ids=[290], n=2)
    assert allows(positive, []) == set(tokens("-0123456789"))
    assert allows(positive, tokens("-1")) == {EOS, 290, *tokens("0123456789")}
    assert allows(zero, tokens("0")) == {EOS, 290}


def test_no_special_token_is_text(structured: StructuredOutputs) -> None:
    """Neither those of the tokenizer, nor ids of the model that it has no token for."""
    one = constraint(structured, {"regex": r"(?s:.*)"})
    assert allows(one, []) <= {EOS, *range(3, 259)}
    assert allows(one, tokens("a")) <= {EOS, *range(3, 259)}


def test_a_grammar_may_have_special_tokens_and_schemas(structured: StructuredOutputs, tokenizer: Tokenizer) -> None:
    begin, end = tokenizer.special_id(TOOL_CALL_BEGIN), tokenizer.special_id(THINK_END)
    assert begin is not None
    assert end is not None
    schema = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    grammar = f'start: (text call)* text\ntext: /[^{{]*/\ncall: <[{begin}]> "f" args <[{end}]>\nargs: %json {schema}\n'
    form = {"grammar": grammar}
    call = [begin, *tokens('f{"a": 5}'), end]
    for output in ([], tokens("hi"), [*tokens("hi"), *call], [*call, *call, *tokens("bye")]):
        one = constraint(structured, form)
        assert {EOS, begin} <= allows(one, output)
        assert end not in allows(one, output)
    one = constraint(structured, form)
    assert allows(one, [begin]) == set(tokens("f"))
    assert allows(one, [begin, *tokens('f{"a":')]) == set(tokens(" -0123456789"))
    assert allows(one, call[:-1]) == {end}
    assert tokens("{")[0] not in allows(one, call)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"regex": "("}, r"structured_outputs\.regex: .*unclosed group"),
        ({"regex": "(?=a)b"}, r"structured_outputs\.regex: .*look-around"),
        ({"grammar": "start: x"}, r'structured_outputs\.grammar: .*unknown name: "x"'),
        ({"grammar": '{"grammars": [{"json_schema": {}}]}'}, r"structured_outputs\.grammar: "),
        ({"grammar": "start: %json [1]"}, r"structured_outputs\.grammar: %json is not followed by a JSON Schema"),
        (
            {"grammar": "start: %json " + '{"items":' * 400 + "{}" + "}" * 400},
            r"structured_outputs\.grammar: the schema after %json is nested more than 64 levels deep",
        ),
        ({"grammar": "start: %json {"}, r"structured_outputs\.grammar: %json is not followed by a JSON Schema"),
        ({"grammar": 'start: %json {"uniqueItems": true}'}, r'Unimplemented keys: \["uniqueItems"\]'),
        ({"grammar": "start: <[100000]>"}, r"structured_outputs\.grammar: "),
        ({"json": {"x-guidance": {"lenient": True}}}, r"structured_outputs\.json: x-guidance in a schema is not supp"),
        ({"json": {"uniqueItems": True}}, r'structured_outputs\.json: Unimplemented keys: \["uniqueItems"\]'),
        ({"json": {"contains": {"const": 1}}}, r'Unimplemented keys: \["contains"\]'),
        ({"json": {"not": {"type": "null"}}}, r'Unimplemented keys: \["not"\]'),
        ({"json": {"properties": {"a": {"if": {}, "then": {}}}}}, r'Unimplemented keys: \["if", "then"\]'),
        ({"json": {"unevaluatedProperties": False}}, r'Unimplemented keys: \["unevaluatedProperties"\]'),
        ({"json": {"propertyNames": {"maxLength": 3}}}, r'Unimplemented keys: \["propertyNames"\]'),
        ({"json": {"dependentRequired": {"a": ["b"]}}}, r'Unimplemented keys: \["dependentRequired"\]'),
        ({"json": {"type": "string", "format": "postcode"}}, "Unknown format: postcode"),
        (
            {"json": {"oneOf": [{"type": "object"}, {"required": ["a"]}]}},
            "oneOf is supported only where no value fits two",
        ),
        ({"json": {"$ref": "https://example.com/schema"}}, r"structured_outputs\.json: .*example\.com"),
        ({"json": {"allOf": [{"type": "null"}, {"type": "string"}]}}, "Unsatisfiable schema"),
        ({"json": {"type": "strin"}}, "Invalid type: strin"),
        ({"json": {"enum": []}}, "structured_outputs.json: "),
        (
            {"grammar": "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(5000)) + '\na5000: "x"'},
            r"structured_outputs\.grammar: the grammar has 5002 rules \(or colons\), at most 1000",
        ),
        (
            {
                "json": {
                    "$defs": {str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(500)},
                    "$ref": "#/$defs/0",
                }
            },
            "its schemas are more than 400 levels deep",
        ),
        ({"json": {"multipleOf": 123456789}}, "have the product 123456789, at most 10000"),
        ({"json": {"items": [{"multipleOf": 0.101}, {"multipleOf": 103}]}}, "have the product 10403, at most 10000"),
        ({"json": {"properties": {str(i): True for i in range(1001)}}}, "an object has 1001 properties, at most 1000"),
        (
            {"json": {"items": [{"patternProperties": {f"^{i}$": True for i in range(33)}}] * 2}},
            "there are 66 patternProperties, at most 64",
        ),
        (
            {"json": {"allOf": [{"pattern": f"a{i}"} for i in range(7)]}},
            "up to 7 patterns, formats and lengths apply to one text, at most 6",
        ),
    ],
)
def test_what_cannot_be_enforced_is_refused(
    structured: StructuredOutputs, form: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        structured.check(SamplingParams.from_dict({"structured_outputs": form}))


def test_patterns_are_counted_where_they_meet(structured: StructuredOutputs) -> None:
    """Any number of patterns is fine as long as few of them apply to the same text."""
    many: dict[str, Any] = {str(i): {"type": "string", "pattern": f"^a{i}", "maxLength": 9} for i in range(50)}
    structured.check(SamplingParams.from_dict({"structured_outputs": {"json": {"properties": many}}}))
    link: Any = {"type": "string"}
    for i in range(7):
        link = {"pattern": f"{i}", "anyOf": [link]}
    branches = {"allOf": [{"properties": {"a": {"pattern": f"{i}"}}} for i in range(7)]}
    chain = {
        "$defs": {f"d{i}": {"pattern": f"{i}", "$ref": f"#/$defs/d{i + 1}"} for i in range(7)},
        "$ref": "#/$defs/d0",
    }
    chain["$defs"]["d7"] = {}  # type: ignore[index]
    named = {"properties": {"allOf": {"properties": {"const": branches}}}}
    for schema in (link, branches, chain, named):
        with pytest.raises(ValueError, match="up to 7 patterns"):
            structured.check(SamplingParams.from_dict({"structured_outputs": {"json": schema}}))


def test_a_form_whose_state_is_too_large_is_found_at_once(structured: StructuredOutputs) -> None:
    """The first token of an object is always the same; the second needs a state for all of these objects."""
    names = [f"p{i}" for i in range(1000)]
    options = [
        {"type": "object", "properties": {name: {"type": "string"} for name in names[i::200]}} for i in range(200)
    ]
    with pytest.raises(ValueError, match=r"structured_outputs\.json: .*items"):
        structured.check(SamplingParams.from_dict({"structured_outputs": {"json": {"anyOf": options}}}))


def test_a_limit_fails_one_sample_and_no_other(structured: StructuredOutputs) -> None:
    """An expression whose number of states grows with every `a`."""
    form = {"regex": "[0-9]{5}(.*a.{1,200}){1,20}"}
    failing, other = constraints(structured, form, n=2)
    reached = 0
    for reached in range(200):
        try:
            failing.mask([*tokens("12345"), *tokens("a") * reached])
        except ConstraintError:
            break
    output = [*tokens("12345"), *tokens("a") * reached]
    assert reached < 199
    for one in (failing, constraint(structured, form)):
        for _ in range(2):
            with pytest.raises(ConstraintError, match="too many expressions"):
                one.mask(output)
    assert allows(other, tokens("12")) == set(tokens("0123456789"))
    assert allows(constraint(structured, form), output[:-1]), "it fails after the same token"


@pytest.mark.parametrize("seed", range(4))
def test_masks_do_not_depend_on_history_or_company(structured: StructuredOutputs, seed: int) -> None:
    """Samples of one grammar, asked in a random order, allow what a sample alone allows, asked only once."""
    rng = random.Random(seed)
    form = {"json": {"type": "object", "properties": {"a": PERSON, "b": {"type": "string", "pattern": "^x+y$"}}}}
    samples = constraints(structured, form, n=3)
    outputs: list[list[int]] = [[], [], []]
    for _ in range(120):
        i = rng.randrange(3)
        allowed = allows(samples[i], outputs[i])
        assert allowed == allows(constraint(structured, form), outputs[i])
        allowed -= {EOS}
        if allowed:
            outputs[i].append(rng.choice(sorted(allowed)))


def merging_tokenizer() -> Tokenizer:
    """Bytes, and the tokens 256 "ye", 257 "yes" and 258 the end."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocab = {char: i for i, char in enumerate(byte_alphabet())} | {"ye": 256, "yes": 257}
    model = {"type": "BPE", "vocab": vocab, "merges": ["y e", "ye s"]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": 258, "content": "<end>", **flags}]
    spec = {"version": "1.0", "added_tokens": added, "pre_tokenizer": byte_level, "decoder": byte_level, "model": model}
    return Tokenizer(spec, eos_token_ids=(258, 5))


def byte(char: str) -> int:
    """Its token in `merging_tokenizer`, whose bytes come in the order of their characters."""
    return list(byte_alphabet()).index(char)


def test_tokens_of_several_bytes_and_several_ends() -> None:
    structured = StructuredOutputs(merging_tokenizer(), 320)
    one = constraint(structured, {"regex": "yes!|yet"})
    mask = [i for i in range(320) if one.mask([])[i >> 5] >> (i & 31) & 1]
    assert mask == [byte("y"), 256, 257]
    both = constraint(structured, {"regex": "yes!?"})
    after = both.mask([256, byte("s")])
    assert [i for i in range(320) if after[i >> 5] >> (i & 31) & 1] == [5, byte("!"), 258]


def test_what_a_model_must_have(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = SamplingParams.from_dict({"structured_outputs": {"regex": "a"}})
    with pytest.raises(ValueError, match="need a tokenizer"):
        StructuredOutputs(None, VOCAB).check(asked)
    StructuredOutputs(None, VOCAB).check(SamplingParams())
    words = Tokenizer({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "decoder": None})
    with pytest.raises(ValueError, match="need a byte-level tokenizer"):
        StructuredOutputs(words, VOCAB).check(asked)
    monkeypatch.setattr(tokenizer, "eos_token_ids", ())
    with pytest.raises(ValueError, match="give stop_token_ids"):
        StructuredOutputs(tokenizer, VOCAB).check(asked)
    stops = SamplingParams.from_dict({"structured_outputs": {"regex": "a"}, "stop_token_ids": [7]})
    StructuredOutputs(tokenizer, VOCAB).check(stops)


def test_without_llguidance_the_extra_is_named(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any) -> Any:
        if name == "llguidance":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.delitem(sys.modules, "llguidance", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    structured = StructuredOutputs(tokenizer, VOCAB)
    structured.check(SamplingParams())
    with pytest.raises(ValueError, match=r"llguidance; install it with pip install 'shoal\[structured\]'"):
        structured.check(SamplingParams.from_dict({"structured_outputs": {"regex": "a"}}))


def test_the_extra_is_declared() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert any(r.startswith("llguidance") for r in project["optional-dependencies"]["structured"])


def test_many_samples_of_a_large_form_are_refused(structured: StructuredOutputs) -> None:
    large = {"choice": ["a" * 1000] * 100}
    constraints(structured, large, n=20)
    with pytest.raises(ValueError, match=r"n times the size of structured_outputs is \d+ bytes, at most 2097152"):
        constraints(structured, large, n=21)


def test_compiled_grammars_are_kept_and_the_oldest_are_dropped(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    structured = StructuredOutputs(tokenizer, VOCAB)
    structured.check(SamplingParams.from_dict({"structured_outputs": {"regex": "a"}}))
    assert structured._backend is not None
    compiled: list[str] = []
    compile_one = structured._backend.compile

    def counted(form: Any) -> Any:
        compiled.append(form.regex)
        return compile_one(form)

    monkeypatch.setattr(structured._backend, "compile", counted)

    def ask(*regexes: str) -> list[str]:
        compiled.clear()
        for regex in regexes:
            structured.check(SamplingParams.from_dict({"structured_outputs": {"regex": regex}}))
        return list(compiled)

    assert ask("a", "b", "a", "b") == ["b"]
    new = [f"c{i}" for i in range(MAX_CACHED_GRAMMARS - 1)]
    assert ask(*new, "b") == new
    assert ask("a", "b") == ["a"]
    big = ["x" * 110_000 + str(i) for i in range(40)]
    assert ask(*big) == big
    assert len(structured._cache._grammars) < 40
    assert ask(big[-1], big[0]) == [big[0]]
