"""Tool calls: which requests may make them, how they are found in text, and what is answered."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoTokenizer

from mell_ray.builtin import model_path
from mell_ray.engine.grammar import GrammarCompiler
from mell_ray.errors import InvalidRequestError
from mell_ray.openai import limits
from mell_ray.openai.errors import from_validation_error
from mell_ray.openai.plan import Generation, plan_chat
from mell_ray.openai.protocol import ChatCompletionRequest
from mell_ray.openai.text import TextPiece
from mell_ray.openai.tool_calls import CallDelta, ToolCallParser, call_id
from mell_ray.openai.tool_formats import (
    HERMES,
    LLAMA3_JSON,
    MISTRAL,
    TOOL_FORMATS,
    ToolFormat,
    find_format,
)
from tests.unit.openai.conftest import make_byte_level

NAMES = ("weather", "add")
SUNNY = '{"city": "Bath {\\"x\\": [1, 2]}", "days": [1, {"a": null}]}'


def read(form: ToolFormat, pieces: list[str], most: int = 0) -> tuple[str, list[dict[str, str]]]:
    """Content and calls, put together as a client does."""
    parser = ToolCallParser(form, NAMES, lambda i: f"id{i}", most)
    content, calls = "", []
    for parsed in [*(parser.push(piece) for piece in pieces), parser.finish()]:
        content += parsed.content
        for delta in parsed.calls:
            if delta.name is not None:
                assert (delta.index, delta.id) == (len(calls), f"id{len(calls)}")
                calls.append({"name": delta.name, "arguments": ""})
            calls[delta.index]["arguments"] += delta.arguments
    assert parser.num_calls == len(calls)
    return content, calls


def call(name: str = "weather", arguments: str = SUNNY) -> dict[str, str]:
    return {"name": name, "arguments": arguments}


def hermes(name: str = "weather", arguments: str = SUNNY) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


CASES: list[tuple[ToolFormat, str, str, list[dict[str, str]]]] = [
    (HERMES, "Just text < here", "Just text < here", []),
    (HERMES, "  \n", "  \n", []),
    (HERMES, hermes(), "", [call()]),
    (HERMES, f"Let me see.\n{hermes()}\n", "Let me see.", [call()]),
    (HERMES, f"{hermes()}\n{hermes('add', '{}')}", "", [call(), call("add", "{}")]),
    (HERMES, hermes() * 2 + " done", " done", [call(), call()]),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', "", [
        call("add", '{"a": 1}')
    ]),
    (HERMES, '<tool_call>{"name":"add"}</tool_call>', "", [call("add", "{}")]),
    (HERMES, '<tool_call>{"name":"add","arguments":"{\\"a\\":1}"}</tool_call>', "", [
        call("add", '{"a":1}')
    ]),
    (HERMES, '<tool_call>{"id": 7, "name":"add","arguments":{}}</tool_call>', "", [
        call("add", "{}")
    ]),
    (HERMES, "a <tool_call> is a tag", "a <tool_call> is a tag", []),
    (HERMES, "<<tool_call>>", "<<tool_call>>", []),
    (HERMES, hermes("unknown"), hermes("unknown"), []),
    (HERMES, '<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', []),
    (HERMES, '<tool_call>{"x": 3}</tool_call>', '<tool_call>{"x": 3}</tool_call>', []),
    (HERMES, '<tool_call>{"name": "ad', '<tool_call>{"name": "ad', []),
    (HERMES, '<tool_call>{"name": "add", "arguments": {"a": 1', "", [call("add", '{"a": 1')]),
    (HERMES, f"{hermes('add', '{}')[:-13]} more", " more", [call("add", "{}")]),
    (LLAMA3_JSON, f'{{"name": "weather", "parameters": {SUNNY}}}', "", [call()]),
    (LLAMA3_JSON, '\n{"name": "add", "parameters": {}}; {"name": "add", "parameters": {}}',
     "", [call("add", "{}"), call("add", "{}")]),
    (LLAMA3_JSON, '{"city": "Bath"}', '{"city": "Bath"}', []),
    (LLAMA3_JSON, 'So {"name": "add", "arguments": 1}', 'So {"name": "add", "arguments": 1}', []),
    (LLAMA3_JSON, "Hello", "Hello", []),
    (MISTRAL, f'[TOOL_CALLS] [{{"name": "weather", "arguments": {SUNNY}}}]', "", [call()]),
    (MISTRAL, '[TOOL_CALLS][{"name":"add","arguments":{}}, {"name":"add","arguments":{"a":[]}}]',
     "", [call("add", "{}"), call("add", '{"a":[]}')]),
    (MISTRAL, '[TOOL_CALLS] {"name": "add", "arguments": {}}', "", [call("add", "{}")]),
    (MISTRAL, "[TOOL] [1, 2]", "[TOOL] [1, 2]", []),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_calls_are_told_from_text(
    form: ToolFormat, text: str, content: str, calls: list[dict[str, str]]
) -> None:
    assert read(form, [text]) == (content, calls)
    assert read(form, list(text)) == (content, calls)


MARKS = [
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    '{"name": "add", ',
    '"arguments": ',
    "{}",
]


@given(
    form=st.sampled_from(list(TOOL_FORMATS.values())),
    parts=st.lists(st.sampled_from([*MARKS, "}", "[", "]", ",", " ", "\n", '"', "x", "<", ";"])),
    cuts=st.lists(st.integers(0, 200)),
)
def test_how_text_is_cut_changes_nothing(
    form: ToolFormat, parts: list[str], cuts: list[int]
) -> None:
    text = "".join(parts)
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in pairwise(edges)]
    assert read(form, pieces) == read(form, [text])


@given(st.text(st.sampled_from('<tol_cal>[]{}" \n,;:\\')))
def test_without_calls_all_text_comes_out(text: str) -> None:
    for form in TOOL_FORMATS.values():
        content, calls = read(form, list(text))
        assert (content, calls) == (text, [])


@given(
    arguments=st.dictionaries(
        st.text(max_size=5),
        st.recursive(
            st.none() | st.integers() | st.text(max_size=8),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2)
            ),
            max_leaves=6,
        ),
        max_size=4,
    ),
    indent=st.sampled_from([None, 2]),
)
def test_any_arguments_come_through_as_they_were_written(
    arguments: dict[str, Any], indent: int | None
) -> None:
    written = json.dumps(arguments, indent=indent)
    content, calls = read(HERMES, list(hermes("add", written)))
    assert (content, calls) == ("", [call("add", written)])


def test_arguments_are_told_as_they_come() -> None:
    parser = ToolCallParser(HERMES, NAMES, lambda i: f"id{i}")
    assert parser.push('<tool_call>\n{"name": "add", "argum').calls == []
    assert parser.push('ents": {"a"').calls == [CallDelta(0, '{"a"', "id0", "add")]
    assert parser.push(": 1").calls == [CallDelta(0, ": 1")]
    assert parser.push("}}\n</tool_c").calls == [CallDelta(0, "}")]


def test_one_call_is_enough_where_no_more_are_wanted() -> None:
    assert read(HERMES, [hermes() + hermes()], most=1) == ("", [call()])
    parser = ToolCallParser(HERMES, NAMES, str, 1)
    parser.push(hermes()[:-13])
    assert parser.complete


def test_ids_are_stable_and_have_the_form_s_shape() -> None:
    assert call_id(HERMES, "r/0", 1) == call_id(HERMES, "r/0", 1)
    ids = {call_id(HERMES, f"r/{i}", j) for i in range(3) for j in range(3)}
    assert len(ids) == 9
    assert all(each.startswith("call_") for each in ids)
    assert len(call_id(MISTRAL, "r/0", 0)) == 9  # what Mistral's templates demand
    assert call_id(MISTRAL, "r/0", 0).isalnum()


# --- the form -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% if tools %}<tools>..<tool_call>{% endif %}", HERMES),
        ({"default": "x", "tool_use": "{{ tools }}<tool_call>"}, HERMES),
        ("{% if tools %}[AVAILABLE_TOOLS][TOOL_CALLS]{% endif %}", MISTRAL),
        ("{{ tools }}{'name': '\"parameters\": '}<|python_tag|>", LLAMA3_JSON),
        ("{{ tools }}<tool_call>\n<function=f>", None),
        ("{{ tools }}[TOOL_CALLS]name[ARGS]", None),
        ("{{ tools }}", None),
        ("<tool_call>", None),
        (None, None),
    ],
)
def test_the_chat_template_shows_the_form(template: Any, expected: ToolFormat | None) -> None:
    tokenizer = make_byte_level()
    tokenizer.chat_template = template
    assert find_format("auto", tokenizer) is expected
    assert find_format("mistral", tokenizer) is MISTRAL


def test_the_built_in_model_speaks_hermes() -> None:
    assert find_format("auto", builtin()) is HERMES


@cache
def builtin() -> Any:
    return AutoTokenizer.from_pretrained(model_path())


# --- the request ----------------------------------------------------------------------------------

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells it.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["Bath", "York"]}},
        },
        "strict": True,
    },
}
NOW = {"type": "function", "function": {"name": "now"}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("fields", "path", "says"),
    [
        ({"tools": {}}, "tools", "list"),
        ({"tools": [NOW] * (limits.MAX_TOOLS + 1)}, "tools", "at most 128"),
        ({"tools": [NOW, NOW]}, "tools", "'now'"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "required"),
        ({"tools": [{"type": "web"}]}, "tools.0.type", "'function'"),
        ({"tools": [named("a b")]}, "tools.0.function.name", "letters"),
        ({"tools": [NOW, {"type": "function", "function": {"name": "f", "parameters": []}}]},
         "tools.1.function.parameters", "JSON object"),
        ({"tools": [{"type": "function", "function": {"name": "f", "paramters": {}}}]},
         "tools.0.function.paramters", "did you mean 'parameters'"),
        ({"tools": [NOW], "tool_choice": "any"}, "tool_choice", '"required"'),
        ({"tools": [NOW], "tool_choice": {"type": "function"}}, "tool_choice", '"required"'),
        ({"tools": [NOW], "tool_choice": named("then")}, "tool_choice", "one of the functions"),
        ({"tool_choice": "required"}, "tool_choice", "'tools'"),
        ({"tool_choice": named("now")}, "tool_choice", "one of the functions"),
        ({"tools": [NOW], "tool_choice": named("now"), "ignore_eos": True}, "tool_choice", "eos"),
        ({"tools": [NOW], "parallel_tool_calls": 1}, "parallel_tool_calls", "boolean"),
    ],
)  # fmt: skip
def test_malformed_tools_are_named_by_their_path(
    fields: dict[str, Any], path: str, says: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        ChatCompletionRequest.model_validate({**CHAT, **fields})
    error = from_validation_error(caught.value)
    assert error.param == path
    assert says in error.message


HISTORY = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "c1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "Bath"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
]


@pytest.mark.parametrize(
    ("index", "change", "path", "says"),
    [
        (2, {"tool_call_id": None}, "messages.2.tool_call_id", "required"),
        (0, {"tool_call_id": "c1"}, "messages.0.tool_call_id", "only allowed"),
        (0, {"tool_calls": HISTORY[1]["tool_calls"]}, "messages.0.tool_calls", "assistant"),
        (1, {"tool_calls": {}}, "messages.1.tool_calls", "list"),
        (1, {"tool_calls": []}, "messages.1.content", "required"),
        (1, {"tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "[1"}}]},
         "messages.1.tool_calls.0.function.arguments", "JSON object"),
        (1, {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
         "messages.1.tool_calls.0.id", "required"),
    ],
)  # fmt: skip
def test_a_malformed_history_of_calls_is_named(
    index: int, change: dict[str, Any], path: str, says: str
) -> None:
    messages = [dict(message) for message in HISTORY]
    messages[index].update(change)
    with pytest.raises(ValidationError) as caught:
        ChatCompletionRequest.model_validate({**CHAT, "messages": messages})
    error = from_validation_error(caught.value)
    assert error.param == path
    assert says in error.message


def plan(tokenizer: Any, form: ToolFormat | None, **fields: Any) -> list[Generation]:
    request = ChatCompletionRequest.model_validate({**CHAT, **fields})
    bounds = {"max_model_len": 4096, "default_max_tokens": 16, "request_seed": 1}
    return plan_chat(request, tokenizer, **bounds, tool_format=form)


def prompt(**fields: Any) -> str:
    (generation,) = plan(builtin(), HERMES, **fields)
    return builtin().decode(generation.prompt_token_ids)


def test_the_chat_template_sees_tools_and_calls() -> None:
    text = prompt(messages=HISTORY, tools=[WEATHER, NOW])
    assert '{"type": "function", "function": {"name": "weather", "description": "Tells it."' in text
    assert '"function": {"name": "now"}' in text
    assert "strict" not in text
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Bath"}}\n</tool_call>' in text
    assert "rain" in text
    plain = prompt(messages=HISTORY[:1])
    assert prompt(messages=HISTORY[:1], tools=[WEATHER], tool_choice="none") == plain


def test_only_what_must_be_called_has_a_grammar() -> None:
    (free,) = plan(builtin(), HERMES, tools=[NOW])
    assert free.tools is not None
    assert free.sampling.grammar is None
    (none,) = plan(builtin(), HERMES, tools=[WEATHER], tool_choice="none")
    assert none.tools is None
    choices = plan(builtin(), HERMES, tools=[WEATHER], tool_choice="required", n=2)
    assert all(choice.sampling.grammar for choice in choices)


def test_a_model_without_a_form_is_told_so() -> None:
    with pytest.raises(InvalidRequestError, match="tool_call_format") as caught:
        plan(builtin(), None, tools=[NOW])
    assert caught.value.param == "tools"
    assert plan(builtin(), None, tools=[NOW], tool_choice="none")


def test_tools_are_bounded_in_all() -> None:
    huge = {"name": "f", "description": "x" * limits.MAX_SCHEMA_CHARS}
    with pytest.raises(InvalidRequestError, match="characters") as caught:
        plan(builtin(), HERMES, tools=[{"type": "function", "function": huge}])
    assert caught.value.param == "tools"


# --- the grammar ----------------------------------------------------------------------------------


def accepts(tokenizer: Any, grammar: str | None, text: str) -> bool:
    assert grammar is not None
    matcher = GrammarCompiler(lambda: tokenizer).matcher(grammar)
    ids = tokenizer.encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def with_marker(tokenizer: Any) -> Any:
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    return tokenizer


FORMS = {
    "hermes": (builtin, HERMES, hermes),
    "llama3_json": (
        builtin,
        LLAMA3_JSON,
        lambda name, arguments: f'{{"name": "{name}", "parameters": {arguments}}}',
    ),
    "mistral": (
        lambda: with_marker(make_byte_level()),
        MISTRAL,
        lambda name, arguments: f'[TOOL_CALLS] [{{"name": "{name}", "arguments": {arguments}}}]',
    ),
}


@pytest.mark.parametrize("name", sorted(FORMS))
def test_what_a_grammar_allows_is_a_call_that_the_parser_finds(name: str) -> None:
    make, form, write = FORMS[name]
    tokenizer = make()
    tokenizer.chat_template = "{{ tools }}x"
    (required,) = plan(tokenizer, form, tools=[WEATHER, NOW], tool_choice="required")
    bath = '{"city": "Bath"}'
    for good in (write("weather", bath), write("now", "{}")):
        assert accepts(tokenizer, required.sampling.grammar, good)
        _, calls = read(form, [good.replace("now", "add")])
        assert len(calls) == 1
    for bad in (
        "Hello",
        write("weather", '{"city": "Rome"}'),
        write("weather", "{}"),
        write("then", "{}"),
        write("now", '{"a": 1}'),
    ):
        assert not accepts(tokenizer, required.sampling.grammar, bad)
    (one,) = plan(tokenizer, form, tools=[WEATHER, NOW], tool_choice=named("now"))
    assert accepts(tokenizer, one.sampling.grammar, write("now", "{}"))
    assert not accepts(tokenizer, one.sampling.grammar, write("weather", bath))


@pytest.mark.parametrize("name", sorted(FORMS))
def test_a_strict_function_is_called_by_its_parameters_or_not_at_all(name: str) -> None:
    make, form, write = FORMS[name]
    tokenizer = make()
    tokenizer.chat_template = "{{ tools }}x"
    (free,) = plan(tokenizer, form, tools=[WEATHER, NOW])
    bath = write("weather", '{"city": "Bath"}')
    texts = ["", "Hello {there}", "two\n\nlines", "a < b, tool_call"]
    # A function that is not strict takes what the model gives it.
    calls = [bath, write("now", "{}"), write("now", '{"a": [1]}')]
    if form.opening:
        calls += ["Well: " + bath, bath + " and that is it"]
    for good in texts + calls:
        assert accepts(tokenizer, free.sampling.grammar, good), good
    for good in calls:
        assert len(read(form, [good.replace("now", "add")])[1]) == 1
    for bad in (
        write("weather", '{"city": "Rome"}'),
        write("weather", "{}"),
        write("then", "{}"),
    ):
        assert not accepts(tokenizer, free.sampling.grammar, bad), bad


def test_strict_functions_are_called_as_often_as_is_wanted() -> None:
    two = " and ".join([hermes("weather", '{"city": "York"}')] * 2)
    (many,) = plan(builtin(), HERMES, tools=[WEATHER])
    assert accepts(builtin(), many.sampling.grammar, two)
    (single,) = plan(builtin(), HERMES, tools=[WEATHER], parallel_tool_calls=False)
    assert not accepts(builtin(), single.sampling.grammar, two)


def test_strict_and_endless_exclude_each_other() -> None:
    with pytest.raises(InvalidRequestError, match="strict") as caught:
        plan(builtin(), HERMES, tools=[WEATHER], ignore_eos=True)
    assert caught.value.param == "ignore_eos"
    assert plan(builtin(), HERMES, tools=[NOW], ignore_eos=True)


def test_several_calls_only_where_they_are_wanted() -> None:
    tokenizer = builtin()
    two = "\n".join([hermes("now", "{}")] * 2)
    tools = {"tools": [NOW], "tool_choice": "required"}
    (many,) = plan(tokenizer, HERMES, **tools)
    assert accepts(tokenizer, many.sampling.grammar, two)
    (single,) = plan(tokenizer, HERMES, **tools, parallel_tool_calls=False)
    assert not accepts(tokenizer, single.sampling.grammar, two)
    (one,) = plan(tokenizer, HERMES, **{**tools, "tool_choice": named("now")})
    assert not accepts(tokenizer, one.sampling.grammar, two)


def test_with_a_response_format_the_answer_is_a_call_or_follows_it() -> None:
    tokenizer = builtin()
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}
    (plain,) = plan(tokenizer, HERMES, tools=[NOW], response_format=wanted)
    for good in ("17", hermes("now", "{}")):
        assert accepts(tokenizer, plain.sampling.grammar, good)
    assert not accepts(tokenizer, plain.sampling.grammar, "seventeen")
    (forced,) = plan(tokenizer, HERMES, tools=[NOW], response_format=wanted, tool_choice="required")
    assert not accepts(tokenizer, forced.sampling.grammar, "17")


def test_a_special_marker_reaches_the_parser() -> None:
    tokenizer = with_marker(make_byte_level())
    tokenizer.chat_template = "{{ tools }}x"
    (generation,) = plan(tokenizer, MISTRAL, tools=[NOW])
    text = generation.open_text(tokenizer)
    ids = tokenizer.encode('[TOOL_CALLS] [{"name": "now", "arguments": {}}]</s>')
    pieces: list[TextPiece] = [text.push(ids), text.finish()]
    parser = generation.open_tools("r")
    assert parser is not None
    parsed = parser.push("".join(piece.text for piece in pieces))
    assert [delta.name for delta in parsed.calls] == ["now"]
    assert parsed.content + parser.finish().content == ""
