"""Rules of reading outputs that the golden cases leave open, per grammar."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shoal.runtime.chat.output import (
    ContentDelta,
    ParsedOutput,
    ReasoningDelta,
    ToolCallDelta,
    assemble,
)
from shoal.runtime.chat.parsers import make_parser
from shoal.runtime.tokenization.tokenizer import Part, Special
from tests.support.outputs import TOKENS, parse, parse_text, tokenizer_with

CALLS, CALLS_END, CALL, CALL_END, SEP = TOKENS["deepseek_v31"][2:]
BLOCK, BLOCK_END = "<｜DSML｜function_calls>", "</｜DSML｜function_calls>"
INVOKE, INVOKE_END, PARAMETER_END = '<｜DSML｜invoke name="f">', "</｜DSML｜invoke>", "</｜DSML｜parameter>"
SECTION, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
KIMI_CALL, KIMI_ARGUMENTS, KIMI_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
ONE_CALL = {
    "deepseek_v3": f"{CALLS}{CALL}function{SEP}f\n```json\n{{}}\n```{CALL_END}{CALLS_END}",
    "deepseek_v31": f"{CALLS}{CALL}f{SEP}{{}}{CALL_END}{CALLS_END}",
    "deepseek_v32": f"\n\n{BLOCK}\n{INVOKE}\n{INVOKE_END}\n{BLOCK_END}",
    "kimi": f"{SECTION}{KIMI_CALL}functions.f:0{KIMI_ARGUMENTS}{{}}{KIMI_END}{SECTION_END}",
    "glm": "<tool_call>f</tool_call>",
}
EVERY_GRAMMAR = pytest.mark.parametrize("grammar", sorted(ONE_CALL))


def calls(output: ParsedOutput) -> list[tuple[str, str]]:
    return [(call.name, call.arguments) for call in output.tool_calls]


def typed_tools(**schemas: Any) -> list[dict[str, Any]]:
    """One tool, f, with these schemas of parameters."""
    return [{"type": "function", "function": {"name": "f", "parameters": {"properties": schemas}}}]


def glm_value(text: str, schema: Any = None) -> Any:
    """GLM's argument k of this text and declared schema."""
    tools = typed_tools(k=schema) if schema is not None else ()
    output = parse_text(
        "glm", f"<tool_call>f<arg_key>k</arg_key><arg_value>{text}</arg_value></tool_call>", tools=tools
    )
    return json.loads(output.tool_calls[0].arguments)["k"]


# All grammars.


@EVERY_GRAMMAR
def test_without_parsing_of_tools_calls_are_text(grammar: str) -> None:
    text = "Looking. " + ONE_CALL[grammar]
    output = parse_text(grammar, "because</think>" + text, start="reasoning", parse_tools=False)
    assert output == ParsedOutput(reasoning="because", content=text, tool_calls=[])
    assert parse_text(grammar, text, start="reasoning", parse_tools=False).reasoning == text


@EVERY_GRAMMAR
def test_a_leading_think_tag_is_dropped_and_a_later_one_is_text(grammar: str) -> None:
    output = parse_text(grammar, "\n<think>a <think> b</think>c</think>d", start="reasoning")
    assert (output.reasoning, output.content) == ("a <think> b", "c</think>d")


@EVERY_GRAMMAR
def test_white_space_of_reasoning_and_content_is_kept(grammar: str) -> None:
    output = parse_text(grammar, " \n a \n</think>\n b \n", start="reasoning")
    assert (output.reasoning, output.content) == (" \n a \n", "\n b \n")


@EVERY_GRAMMAR
def test_an_output_that_may_open_its_reasoning_and_does_not_is_content(grammar: str) -> None:
    assert parse_text(grammar, " \n No.", start="auto") == ParsedOutput(
        reasoning=None, content=" \n No.", tool_calls=[]
    )
    output = parse_text(grammar, " \n " + ONE_CALL[grammar], start="auto")
    assert (output.reasoning, output.content, calls(output)) == (None, None, [("f", "{}")])


@EVERY_GRAMMAR
def test_content_is_empty_once_reasoning_has_ended_and_null_before(grammar: str) -> None:
    assert parse_text(grammar, "a</think>", start="reasoning").content == ""
    assert parse_text(grammar, "", start="content").content == ""
    assert parse_text(grammar, "a", start="reasoning").content is None
    assert parse_text(grammar, "", start="reasoning") == ParsedOutput(reasoning=None, content=None, tool_calls=[])
    assert parse_text(grammar, ONE_CALL[grammar]).content is None


@EVERY_GRAMMAR
def test_white_space_alone_beside_calls_is_no_content(grammar: str) -> None:
    assert parse_text(grammar, " \n\n " + ONE_CALL[grammar]).content is None
    assert parse_text(grammar, " \n\n ").content == " \n\n "


@EVERY_GRAMMAR
def test_an_opener_of_calls_ends_the_reasoning(grammar: str) -> None:
    deltas, is_malformed = parse(grammar, [["hm" + ONE_CALL[grammar]]], start="reasoning")
    output = assemble(deltas)
    assert (output.reasoning, output.content, calls(output)) == ("hm", None, [("f", "{}")])
    assert is_malformed


@EVERY_GRAMMAR
def test_a_well_formed_output_is_not_malformed(grammar: str) -> None:
    assert not parse(grammar, [["a</think>b" + ONE_CALL[grammar]]], start="reasoning")[1]


@EVERY_GRAMMAR
def test_text_is_held_back_only_while_it_may_begin_a_tag(grammar: str) -> None:
    parser = make_parser(grammar, start="reasoning", parse_tools=True)
    assert parser.feed(["because </thi"]) == [ReasoningDelta("because ")]
    assert parser.feed(["s"]) == [ReasoningDelta("</this")]
    assert parser.feed(["</think"]) == []
    assert parser.feed([">a <"]) == [ContentDelta("a" if grammar == "glm" else "a ")]
    assert parser.feed(["="]) == [ContentDelta(" <=" if grammar == "glm" else "<=")]
    assert parser.feed(["</think>", "<"]) == [ContentDelta("</think>")]
    assert parser.finish() == [ContentDelta("<")]


@EVERY_GRAMMAR
def test_the_first_delta_of_a_call_has_its_name(grammar: str) -> None:
    deltas = [d for d in parse(grammar, [[c] for c in ONE_CALL[grammar]])[0] if isinstance(d, ToolCallDelta)]
    assert [(d.index, d.name) for d in deltas if d.name is not None] == [(0, "f")]
    assert deltas[0].name == "f"


@pytest.mark.parametrize("grammar", sorted(set(ONE_CALL) - {"glm"}))
def test_text_after_the_calls_is_dropped_and_further_calls_are_not(grammar: str) -> None:
    output = parse_text(grammar, f"a{ONE_CALL[grammar]}b{ONE_CALL[grammar]}c")
    assert (output.content, calls(output)) == ("a", [("f", "{}"), ("f", "{}")])


# V3, R1 and V3.1.


def test_v3_and_v31_keep_white_space_before_calls() -> None:
    assert parse_text("deepseek_v3", "a\n\n" + ONE_CALL["deepseek_v3"]).content == "a\n\n"
    assert parse_text("deepseek_v31", "a\n\n" + ONE_CALL["deepseek_v31"]).content == "a\n\n"


def test_v3_fences() -> None:
    def arguments(text: str) -> str:
        return parse_text("deepseek_v3", f"{CALLS}{CALL}function{SEP}f\n{text}{CALL_END}").tool_calls[0].arguments

    assert arguments("```json\n\n```") == "{}"
    assert arguments("```json\n```") == "{}"
    assert arguments("```json\n{}\n```\n```") == "{}\n```"
    assert arguments("```json\n{}") == "{}"  # never closed
    assert arguments('{"a": 1}') == '{"a": 1}'
    assert arguments("```js\n{}\n```") == "```js\n{}\n```"


def test_v3_several_calls_stand_on_lines() -> None:
    call = f"{CALL}function{SEP}f\n```json\n{{}}\n```{CALL_END}"
    deltas, is_malformed = parse("deepseek_v3", [[f"{CALLS}{call}\n{call}{CALLS_END}"]])
    assert calls(assemble(deltas)) == [("f", "{}"), ("f", "{}")]
    assert not is_malformed


def test_v3_a_header_that_is_no_function_is_not_lost() -> None:
    output = parse_text("deepseek_v3", f"{CALLS}{CALL}procedure{SEP}f\n```json\n{{}}\n```{CALL_END}{CALLS_END}")
    assert (output.content, calls(output)) == ("procedure", [("f", "{}")])
    output = parse_text("deepseek_v3", f"{CALLS}{CALL}f{CALL_END}{CALLS_END}")
    assert (output.content, calls(output)) == ("f", [])


def test_v31_arguments_are_verbatim() -> None:
    output = parse_text("deepseek_v31", f"{CALLS}{CALL}f{SEP} \n{{}} \n{CALL_END}{CALL}g{SEP} \n{CALL_END}{CALLS_END}")
    assert calls(output) == [("f", " \n{} \n"), ("g", "{}")]


def test_v31_a_call_without_separator_has_no_arguments() -> None:
    deltas, is_malformed = parse("deepseek_v31", [[f"{CALLS}{CALL}f{CALL_END}{CALLS_END}"]])
    assert (calls(assemble(deltas)), is_malformed) == ([("f", "{}")], True)


def test_text_between_calls_becomes_content() -> None:
    call = f"{CALL}f{SEP}{{}}{CALL_END}"
    deltas, is_malformed = parse("deepseek_v31", [[f"a{CALLS} b  c {call} d {call}\n{CALLS_END}"]])
    output = assemble(deltas)
    assert (output.content, calls(output)) == ("a b  c d", [("f", "{}"), ("f", "{}")])
    assert is_malformed


def test_a_call_that_is_cut_off_is_handed_on_as_far_as_it_came() -> None:
    assert calls(parse_text("deepseek_v31", f"{CALLS}{CALL}tide_hei")) == [("tide_hei", "")]
    assert calls(parse_text("deepseek_v31", f'{CALLS}{CALL}f{SEP}{{"a": "b ')) == [("f", '{"a": "b ')]
    assert calls(parse_text("deepseek_v31", f"{CALLS}{CALL}")) == []
    assert calls(parse_text("deepseek_v3", f"{CALLS}{CALL}funct")) == []
    assert calls(parse_text("deepseek_v3", f"{CALLS}{CALL}function{SEP}tide_hei")) == [("tide_hei", "")]
    assert calls(parse_text("deepseek_v3", f"{CALLS}{CALL}function{SEP}f\n```js")) == [("f", "")]
    assert parse_text("deepseek_v31", f"a{CALLS}<｜tool▁ca") == ParsedOutput(reasoning=None, content="a", tool_calls=[])


def test_v31_special_tokens_end_arguments_and_their_text_does_not() -> None:
    tokenizer = tokenizer_with(TOKENS["deepseek_v31"])
    parts: list[Part] = [Special(CALLS), Special(CALL), "f", Special(SEP), f'{{"a": "{CALL_END}"}}', Special(CALL_END)]
    deltas, _ = parse("deepseek_v31", [parts], tokenizer=tokenizer)
    assert calls(assemble(deltas)) == [("f", f'{{"a": "{CALL_END}"}}')]
    deltas, _ = parse("deepseek_v31", [["a", CALLS, Special("<｜User｜>"), "b"]], tokenizer=tokenizer)
    assert assemble(deltas).content == f"a{CALLS}<｜User｜>b"


def test_a_tag_does_not_continue_across_a_special_token() -> None:
    tokenizer = tokenizer_with(["<x>"])  # the think tags are text
    deltas, _ = parse("deepseek_v31", [["a</th"], [Special("<x>"), "ink>b"]], start="reasoning", tokenizer=tokenizer)
    assert assemble(deltas).reasoning == "a</th<x>ink>b"


# DSML.


def v32_arguments(parameters: str) -> str:
    text = f"\n\n{BLOCK}\n{INVOKE}\n{parameters}\n{INVOKE_END}\n{BLOCK_END}"
    return parse_text("deepseek_v32", text).tool_calls[0].arguments


def v32_parameter(text: str, attribute: str = ' string="true"') -> str:
    return f'<｜DSML｜parameter name="k"{attribute}>{text}{PARAMETER_END}'


def test_v32_exactly_one_blank_line_belongs_to_the_block() -> None:
    assert parse_text("deepseek_v32", "a\n" + ONE_CALL["deepseek_v32"]).content == "a\n"
    assert parse_text("deepseek_v32", "a" + ONE_CALL["deepseek_v32"].lstrip()).content == "a"
    assert parse_text("deepseek_v32", "a\n" + ONE_CALL["deepseek_v32"].lstrip()).content == "a\n"


@pytest.mark.parametrize(
    "text", [' <b>&amp;</b> "x" \\ \n\t', "</｜DSML｜invoke>", "<｜DSML｜parameter", "é⛵\x00", ""]
)
def test_v32_a_string_is_its_raw_text(text: str) -> None:
    assert json.loads(v32_arguments(v32_parameter(text))) == {"k": text}


@pytest.mark.parametrize("attribute", [' string="false"', ""])
def test_v32_other_values_are_their_text_if_that_is_json(attribute: str) -> None:
    def value(text: str) -> str:
        return v32_arguments(v32_parameter(text, attribute)).removeprefix('{"k": ').removesuffix("}")

    kept = ["1.50", "1e400", "-0", " [1,2] ", '"a"', "null", '{"a": {"b": "é"}}', "9" * 5000]
    assert [value(text) for text in kept] == kept
    assert [value(text) for text in ["NaN", "True", "", "01", "1 2", "[" * 100_000]] == [
        *('"NaN"', '"True"', '""', '"01"', '"1 2"'),
        f'"{"[" * 100_000}"',
    ]


def test_v32_strings_come_in_whole_escapes_as_they_are_written() -> None:
    parser = make_parser("deepseek_v32", start="content", parse_tools=True)
    parser.feed([f'{BLOCK}{INVOKE}<｜DSML｜parameter name="k" string="true'])
    assert parser.feed(['">']) == [ToolCallDelta(0, arguments='{"k": "')]
    assert parser.feed(['a"']) == [ToolCallDelta(0, arguments='a\\"')]
    assert parser.feed(["\n</｜DS"]) == [ToolCallDelta(0, arguments="\\n")]
    assert parser.feed(["K"]) == [ToolCallDelta(0, arguments="</｜DSK")]
    assert parser.feed([PARAMETER_END]) == [ToolCallDelta(0, arguments='"')]
    assert parser.feed(['<｜DSML｜parameter name="n" string="false">1']) == [ToolCallDelta(0, arguments=', "n": ')]
    assert parser.feed(["2" + PARAMETER_END]) == [ToolCallDelta(0, arguments="12")]
    assert parser.feed([INVOKE_END]) == [ToolCallDelta(0, arguments="}")]


def test_v32_calls_that_are_not_closed() -> None:
    next_invoke = f"{BLOCK}{INVOKE}{v32_parameter('a')}{INVOKE}{INVOKE_END}{BLOCK_END}"
    assert calls(parse_text("deepseek_v32", next_invoke)) == [("f", '{"k": "a"}'), ("f", "{}")]
    assert calls(parse_text("deepseek_v32", f"{BLOCK}{INVOKE}{v32_parameter('a')}{BLOCK_END}")) == [("f", '{"k": "a"}')]


def test_v32_text_after_a_bare_invoke_is_text_after_the_calls() -> None:
    output = parse_text("deepseek_v32", f"a\n\n{INVOKE}{INVOKE_END}\n{INVOKE}{INVOKE_END}\nb")
    assert (output.content, calls(output)) == ("a", [("f", "{}"), ("f", "{}")])


def test_v32_a_json_object_in_place_of_parameters_is_verbatim() -> None:
    assert v32_arguments('{"a":1, "b": "</｜DSML｜parameter>" }') == '{"a":1, "b": "</｜DSML｜parameter>" }'
    assert v32_arguments('{"a": }') == '{"a": }'


def test_v32_calls_that_are_cut_off() -> None:
    def cut_off(text: str) -> list[tuple[str, str]]:
        return calls(parse_text("deepseek_v32", f"{BLOCK}\n{text}"))

    assert cut_off("<｜DSML｜invo") == []
    assert cut_off('<｜DSML｜invoke name="f"') == [("f", "")]
    assert cut_off(f'{INVOKE}\n<｜DSML｜parameter name="po') == [("f", '{"po')]
    assert cut_off(f'{INVOKE}\n<｜DSML｜parameter name="port" string="tr') == [("f", '{"port')]
    assert cut_off(f'{INVOKE}\n<｜DSML｜parameter name="days" string="false">[1, 2') == [("f", '{"days": [1, 2')]
    assert cut_off(f'{INVOKE}\n{{"port": "Br ') == [("f", '{"port": "Br ')]
    assert parse_text("deepseek_v32", f"{BLOCK}\n<｜DSML｜invo").content is None


def test_lookalikes_of_dsml_are_text() -> None:
    for text in ["<|DSML|function_calls>", "< ｜DSML｜function_calls>", "<｜DSML｜tool_calls>"]:
        assert parse_text("deepseek_v32", text + "\n" + INVOKE_END).content == text + "\n" + INVOKE_END


def test_v4_tags_need_their_token() -> None:
    tokenizer = tokenizer_with(TOKENS["deepseek_v4"])
    dsml = Special("｜DSML｜")
    parts: list[Part] = ["Hm.\n\n<", dsml, "tool_calls>\n<", dsml, 'invoke name="f">\n</', dsml, "invoke>\n</", dsml]
    parts.append("tool_calls>")
    deltas, is_malformed = parse("deepseek_v4", [[p] for p in parts], tokenizer=tokenizer)
    output = assemble(deltas)
    assert (output.content, calls(output), is_malformed) == ("Hm.", [("f", "{}")], False)
    text = "".join(p if isinstance(p, str) else p.text for p in parts)
    assert assemble(parse("deepseek_v4", [[text]], tokenizer=tokenizer)[0]).content == text


# Kimi.


def test_kimi_ids() -> None:
    def read(call_id: str) -> tuple[str | None, str]:
        output = parse_text("kimi", f"{SECTION}{KIMI_CALL}{call_id}{KIMI_ARGUMENTS}{{}}{KIMI_END}{SECTION_END}")
        return output.tool_calls[0].id, output.tool_calls[0].name

    assert read("functions.a.b:12") == ("functions.a.b:12", "a.b")
    assert read("functions.a:1:2") == ("functions.a:1:2", "a:1")
    assert read(" call_17\n") == ("call_17", "call_17")
    assert read("") == (None, "")


def test_kimi_markers_inside_json_strings_are_data() -> None:
    arguments = f'{{"a": "\\"{KIMI_END}", "b": "{SECTION_END}\\\\"}}'
    call = f"{KIMI_CALL}functions.f:0{KIMI_ARGUMENTS}{arguments}{KIMI_END}"
    assert calls(parse_text("kimi", f"{SECTION}{call}{call}{SECTION_END}")) == [("f", arguments)] * 2
    arguments = f'{{"a": "\\{KIMI_END}"}}'
    call = f"{KIMI_CALL}functions.f:0{KIMI_ARGUMENTS}{arguments}{KIMI_END}"
    assert calls(parse_text("kimi", f"{SECTION}{call}{call}{SECTION_END}")) == [("f", arguments)] * 2


def test_kimi_a_token_ends_the_arguments_inside_a_json_string() -> None:
    tokenizer = tokenizer_with(TOKENS["kimi"])
    parts: list[Part] = [Special(SECTION), Special(KIMI_CALL), "functions.f:0", Special(KIMI_ARGUMENTS), '{"a": "b']
    parts += [Special(KIMI_END), Special(SECTION_END), "c"]
    assert calls(assemble(parse("kimi", [parts], tokenizer=tokenizer)[0])) == [("f", '{"a": "b')]


# GLM.


def test_glm_content_is_stripped_around_calls() -> None:
    call = ONE_CALL["glm"]
    output = parse_text("glm", f"\n a \n{call}\n b \n{call}\n c \n")
    assert (output.content, calls(output)) == ("a \n\n b \n\n c", [("f", "{}"), ("f", "{}")])


def test_glm_content_streams_unless_it_begins_with_white_space() -> None:
    parser = make_parser("glm", start="content", parse_tools=True)
    assert parser.feed(["a "]) == [ContentDelta("a")]
    assert parser.feed(["b"]) == [ContentDelta(" b")]
    parser = make_parser("glm", start="content", parse_tools=True)
    assert parser.feed(["\na b "]) == []
    assert parser.feed(["<tool_call>f<arg_key>"]) == [ContentDelta("a b"), ToolCallDelta(0, name="f")]
    parser = make_parser("glm", start="content", parse_tools=False)
    assert parser.feed(["\na "]) == [ContentDelta("\na ")]


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("007", {"type": "string"}, "007"),
        ("null", {"type": "string"}, "null"),
        (" a ", {"type": "string"}, " a "),
        ("a</arg_value>b", {"type": "string"}, "a</arg_value>b"),
        ("a</arg_value>\n</arg_value>", {"type": "string"}, "a</arg_value>\n</arg_value>"),
        ("7", {"type": "integer"}, 7),
        ("seven", {"type": "integer"}, "seven"),
        ('"7"', {"type": "integer"}, "7"),
        ("true", {"type": "boolean"}, True),
        ("True", {"type": "boolean"}, "True"),
        ("null", {"type": ["string", "null"]}, None),
        ("7", {"type": ["string", "null"]}, "7"),
        ('"a"', {"type": ["string", "null"]}, '"a"'),
        ("7", {"type": ["string", "number"]}, 7),
        ("7.5", {"type": ["string", "integer"]}, "7.5"),
        ("[1]", {"anyOf": [{"type": "string"}, {"type": "array"}]}, [1]),
        ("[1]", {"anyOf": [{"type": "string"}, {"type": "null"}]}, "[1]"),
        ("7", {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/x"}]}, 7),
        ("7", {"enum": ["7", "8"]}, "7"),
        ("7", {"enum": [7, 8]}, 7),
        ("7", {}, 7),
        ("7", True, 7),
        ('"7"', None, '"7"'),
        ("", None, ""),
        ("", {"type": "string"}, ""),
    ],
)
def test_glm_values_follow_their_declared_types(text: str, schema: Any, value: Any) -> None:
    assert glm_value(text, schema) == value
    assert type(glm_value(text, schema)) is type(value)


def test_glm_text_between_key_and_value_becomes_content() -> None:
    text = "<tool_call>f<arg_key>k</arg_key>a b<arg_value>c</arg_value></tool_call>d"
    deltas, is_malformed = parse("glm", [[text]])
    output = assemble(deltas)
    assert (output.content, calls(output), is_malformed) == ("a bd", [("f", '{"k": "c"}')], True)


def test_glm_a_key_without_value_has_an_empty_string() -> None:
    output = parse_text("glm", "<tool_call>f<arg_key>a</arg_key><arg_key>b</arg_key></tool_call>")
    assert calls(output) == [("f", '{"a": "", "b": ""}')]


def test_glm_calls_that_are_cut_off() -> None:
    tools = typed_tools(s={"type": "string"})

    def cut_off(text: str) -> list[tuple[str, str]]:
        return calls(parse_text("glm", "<tool_call>" + text, tools=tools))

    assert cut_off("") == []
    assert cut_off("f\n") == [("f", "")]
    assert cut_off("f<arg_ke") == [("f", "")]
    assert cut_off("f<arg_key>po") == [("f", '{"po')]
    assert cut_off("f<arg_key>s</arg_key><arg_va") == [("f", '{"s": "')]
    assert cut_off("f<arg_key>s</arg_key><arg_value>a </arg_value>\n") == [("f", '{"s": "a "')]
    assert cut_off("f<arg_key>s</arg_key><arg_value>a </arg_value></tool_c") == [("f", '{"s": "a "')]
    assert cut_off("f<arg_key>n</arg_key><arg_value>[1, ") == [("f", '{"n": [1, ')]
