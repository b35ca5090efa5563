"""Answers that keep to a grammar of calls, against the parsers: random ones of every format are read as valid calls."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from shoal.runtime.chat.call_grammar import CallRules, call_grammar
from shoal.runtime.chat.output import ParsedOutput
from shoal.runtime.chat.parsers import PARSERS
from shoal.runtime.chat.prompt import OutputFormat, parse_output
from shoal.runtime.structured.constraint import GrammarConstraint
from shoal.runtime.structured.structured_outputs import StructuredOutputs
from shoal.runtime.tokenization.tokenizer import Tokenizer

from ...support.structured import EOS, FIRST_BYTE, accepts, allows, byte_tokenizer, constraint, tokens

TRIP: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome"]},
        "days": {"$ref": "#/$defs/days"},
        "note": {"type": "string"},
        "deep": {
            "type": "object",
            "properties": {"x": {"type": "boolean"}},
            "required": ["x"],
            "additionalProperties": False,
        },
    },
    "required": ["city", "days", "note"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer", "enum": [1, 2, 3]}},
}
NOTHING = {"type": "object", "maxProperties": 0}
TOOLS = (
    {"type": "function", "function": {"name": "trip", "parameters": TRIP}},
    {"type": "function", "function": {"name": "now"}},
)
ENDS_OF_TEXT = ("</｜DSML｜parameter>\n", "</arg_value>")
RULES = {
    "required": CallRules(is_required=True),
    "named": CallRules(is_required=True, name="trip"),
    "auto": CallRules(is_required=False, is_parallel=False),
}


@pytest.fixture(scope="module", params=["tags are tokens", "tags are text"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    tokenizer = byte_tokenizer(directory)
    if request.param == "tags are text":
        return tokenizer
    spec = json.loads((directory / "tokenizer.json").read_text())
    tags = sorted({tag for parser in PARSERS.values() for tag in parser.tokens if tokenizer.special_id(tag) is None})
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    spec["added_tokens"] += [{"id": 272 + i, "content": tag, **flags} for i, tag in enumerate(tags)]
    return Tokenizer(spec, [EOS])


@pytest.fixture(scope="module")
def structured(tokenizer: Tokenizer) -> StructuredOutputs:
    return StructuredOutputs(tokenizer, 300)


def random_answer(one: GrammarConstraint, rng: random.Random, tokenizer: Tokenizer) -> list[int] | None:
    """An answer of tokens that a constraint allows, which ends texts now and then; None if it does not end soon."""
    output: list[int] = []
    while len(output) < 1500:
        allowed = allows(one, output)
        if allowed == {EOS} or (EOS in allowed and rng.random() < 0.5):
            return output
        specials = sorted(token for token in allowed - {EOS} if tokenizer.special_text(token))
        if specials and rng.random() < 0.6:
            output.append(rng.choice(specials))
            continue
        printable = sorted(token for token in allowed if 32 <= token - FIRST_BYTE < 127)
        if len(printable) > 60 and rng.random() < 0.3:
            output += _text_end(one, output, rng, tokenizer)
        else:
            output.append(rng.choice(printable or sorted(allowed - {EOS})))
    return None


def _text_end(one: GrammarConstraint, output: list[int], rng: random.Random, tokenizer: Tokenizer) -> list[int]:
    """As much as is allowed of a tag that ends texts."""
    added: list[int] = []
    for token in _tag_ids(rng.choice(ENDS_OF_TEXT), tokenizer):
        if token not in allows(one, output + added):
            break
        added.append(token)
    return added


def _tag_ids(tag: str, tokenizer: Tokenizer) -> list[int]:
    special = tokenizer.find_special(tag)
    before, _, after = tag.partition(special) if special else (tag, "", "")
    found = None if special is None else tokenizer.special_id(special)
    return [*tokens(before), *([] if found is None else [found]), *tokens(after)]


def parsed(output: list[int], grammar: str, tokenizer: Tokenizer) -> ParsedOutput:
    output_format = OutputFormat(grammar, "content", tuple(map(dict, TOOLS)))
    return parse_output(tokenizer.decode(output), output, output_format, tokenizer=tokenizer)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("grammar", PARSERS)
def test_random_answers_are_valid_calls(
    grammar: str, rules: str, structured: StructuredOutputs, tokenizer: Tokenizer
) -> None:
    text = call_grammar(grammar, TOOLS, RULES[rules], tokenizer)
    num_calls = 0
    for seed in range(6):
        one = constraint(structured, {"grammar": text})
        output = random_answer(one, random.Random(f"{grammar} {rules} {seed}"), tokenizer)
        if output is None:
            continue
        answer = parsed(output, grammar, tokenizer)
        assert not answer.is_malformed, tokenizer.decode(output, skip_special_tokens=False)
        num_calls += len(answer.tool_calls)
        for call in answer.tool_calls:
            jsonschema.validate(json.loads(call.arguments), TRIP if call.name == "trip" else NOTHING)
        if rules != "auto":
            assert answer.tool_calls
            assert answer.content is None
        if rules != "required":
            assert len(answer.tool_calls) <= 1
        if rules == "named":
            assert answer.tool_calls[0].name == "trip"
    assert num_calls > 0 or rules == "auto"


def test_calls_as_models_write_them_are_allowed(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path)
    structured = StructuredOutputs(tokenizer, 300)
    written = {
        "kimi": "<|tool_calls_section_begin|><|tool_call_begin|>functions.trip:0<|tool_call_argument_begin|>"
        '{"city": "Rome", "days": 2, "note": "a"}<|tool_call_end|><|tool_calls_section_end|>',
        "deepseek_v32": '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="trip">\n'
        '<｜DSML｜parameter name="city" string="true">Rome</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="note" string="true">a < b, "c"\n</b></｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜function_calls>",
        "glm": "<tool_call>trip\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>2</arg_value>\n<arg_key>note</arg_key>\n<arg_value>a < b</arg_value>\n</tool_call>",
    }
    for grammar, text in written.items():
        lark = call_grammar(grammar, TOOLS, CallRules(is_required=True), tokenizer)
        assert accepts(structured, {"grammar": lark}, text), grammar
        assert not accepts(structured, {"grammar": lark}, text.replace("Rome", "Oslo")), grammar
        lark = call_grammar(grammar, TOOLS, CallRules(is_required=False), tokenizer)
        assert accepts(structured, {"grammar": lark}, f"I look it up.{text}"), grammar
        assert accepts(structured, {"grammar": lark}, "I do not know."), grammar
        assert not accepts(structured, {"grammar": lark}, f"I look.{text.replace('Rome', 'Oslo')}"), grammar
        lark = call_grammar(grammar, TOOLS, CallRules(is_required=False), tokenizer, text='%json {"type": "object"}')
        assert accepts(structured, {"grammar": lark}, text), grammar
        assert not accepts(structured, {"grammar": lark}, text.replace("Rome", "Oslo")), grammar


@pytest.mark.parametrize("grammar", PARSERS)
def test_an_answer_is_calls_or_what_was_asked_for(grammar: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path)
    structured = StructuredOutputs(tokenizer, 300)
    rules = CallRules(is_required=False)
    lark = call_grammar(grammar, TOOLS, rules, tokenizer, text='%json {"type": "integer", "minimum": 10}')
    assert accepts(structured, {"grammar": lark}, "12")
    assert not accepts(structured, {"grammar": lark}, "twelve")
    assert not accepts(structured, {"grammar": lark}, "")


@pytest.mark.parametrize(
    ("grammar", "function", "message"),
    [
        ("glm", {"parameters": {"properties": {"x": {"type": "string", "pattern": "a+"}}}, "strict": True}, "a form"),
        ("deepseek_v32", {"parameters": {"type": "object", "properties": {'a"': {}}}}, "a name that cannot be written"),
        ("deepseek_v4", {"parameters": {"anyOf": [{}], "type": "string"}}, "must be an object with properties"),
    ],
)
def test_what_a_format_cannot_write_is_refused(
    grammar: str, function: Mapping[str, Any], message: str, tmp_path: Path
) -> None:
    tool = {"type": "function", "function": {"name": "f", **function}}
    with pytest.raises(ValueError, match=message):
        call_grammar(grammar, [tool], CallRules(is_required=True), byte_tokenizer(tmp_path))


def test_a_tool_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'walk', which is not among the tools"):
        call_grammar("kimi", TOOLS, CallRules(is_required=True, name="walk"), byte_tokenizer(tmp_path))
