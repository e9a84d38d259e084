"""What is accepted, and that every refusal names the field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import ChatCompletionMessage
from openai.types.chat import completion_create_params as chat_params
from pydantic import BaseModel, ValidationError

from mell_ray.errors import InvalidRequestError
from mell_ray.openai import limits, protocol
from mell_ray.openai.errors import error_body, from_validation_error
from mell_ray.openai.protocol import ChatCompletionRequest, CompletionRequest

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}
SURROGATE = json.loads('"\\ud800"')


def refusal(cls: type[BaseModel], body: Any) -> InvalidRequestError:
    with pytest.raises(ValidationError) as caught:
        cls.model_validate(body)
    return from_validation_error(caught.value)


BAD_IN_BOTH = [
    ("model", "", "GET /v1/models"),
    ("model", 3, "GET /v1/models"),
    ("model", None, "required"),
    ("n", 0, "greater than or equal to 1"),
    ("n", limits.MAX_N + 1, f"less than or equal to {limits.MAX_N}"),
    ("n", True, "integer"),
    ("n", "2", "integer"),
    ("n", 2.5, "integer"),
    ("max_tokens", 0, "greater than or equal to 1"),
    ("max_tokens", 2**40, "less than or equal"),
    ("max_tokens", "many", "integer"),
    ("min_tokens", -1, "greater than or equal to 0"),
    ("temperature", -0.1, "greater than or equal to 0"),
    ("temperature", 2.1, "less than or equal to 2"),
    ("temperature", float("nan"), "finite"),
    ("temperature", float("inf"), "finite"),
    ("temperature", True, "number"),
    ("temperature", "hot", "number"),
    ("top_p", 0, "greater than 0"),
    ("top_p", 1.01, "less than or equal to 1"),
    ("top_k", -2, "greater than or equal to -1"),
    ("min_p", 1.5, "less than or equal to 1"),
    ("seed", 2**63, "less than or equal"),
    ("seed", 1.5, "integer"),
    pytest.param("seed", 10**5000, "less than or equal", id="seed-huge"),
    ("temperature", 10**400, "number"),
    ("logit_bias", {10**5000: 1}, "token ids"),
    ("logit_bias", {True: 1}, "token ids"),
    ("logit_bias", {"1": 10**5000}, "from -100 to 100"),
    ("stop", "", "1 to 256 characters"),
    ("stop", ["a", ""], "1 to 256 characters"),
    ("stop", ["a"] * 17, "at most 16"),
    ("stop", "x" * 257, "1 to 256 characters"),
    ("stop", [1], "a string or a list of strings"),
    ("stop", SURROGATE, "Unicode"),
    ("frequency_penalty", 2.5, "less than or equal to 2"),
    ("presence_penalty", -3, "greater than or equal to -2"),
    ("repetition_penalty", 0, "greater than 0"),
    ("logit_bias", [], "an object"),
    ("logit_bias", {"x": 1}, "token ids"),
    ("logit_bias", {"-1": 1}, "token ids"),
    ("logit_bias", {"99999999999": 1}, "token ids"),
    ("logit_bias", {"1": 101}, "from -100 to 100"),
    ("logit_bias", {"1": float("nan")}, "from -100 to 100"),
    ("logit_bias", {"1": True}, "from -100 to 100"),
    ("logit_bias", {str(i): 1 for i in range(1025)}, "at most 1024"),
    ("ignore_eos", 1, "boolean"),
    ("stop_token_ids", [True], "integer token ids"),
    ("stop_token_ids", 5, "integer token ids"),
    ("stop_token_ids", [-1], "vocabulary"),
    ("stop_token_ids", list(range(65)), "at most 64"),
    ("priority", 2**31, "less than or equal"),
    ("stream", "yes", "boolean"),
    ("stream_options", {"include_usage": True}, "'stream': true"),
    ("temprature", 1, "did you mean 'temperature'"),
    ("zzz", 1, "unknown field; remove it"),
]
BAD_CHAT = [
    ("messages", [], "non-empty list"),
    ("messages", "hi", "non-empty list"),
    ("messages", None, "required"),
    ("messages", [{}] * (limits.MAX_MESSAGES + 1), "at most 4096"),
    ("max_completion_tokens", 0, "greater than or equal to 1"),
    ("top_logprobs", 3, "'logprobs': true"),
    ("top_logprobs", 21, "less than or equal to 20"),
    ("logprobs", 3, "boolean"),
    ("functions", [{}], "not supported"),
    ("function_call", {"name": "f"}, "not supported"),
    ("modalities", ["text", "audio"], "not supported"),
    ("audio", {"voice": "x"}, "not supported"),
    ("reasoning_effort", "high", "not supported"),
    ("web_search_options", {}, "not supported"),
    ("prompt", "hi", "unknown field"),
]
BAD_TEXT = [
    ("prompt", None, "required"),
    ("prompt", [], "non-empty list"),
    ("prompt", 5, "non-empty list"),
    ("prompt", [[]], "must not be empty"),
    ("prompt", ["a", 1], "each prompt"),
    ("prompt", [1, "a"], "each prompt"),
    ("prompt", [True], "each prompt"),
    ("prompt", [[1.0]], "each prompt"),
    ("prompt", [-1], "vocabulary"),
    ("prompt", [2**40], "vocabulary"),
    ("prompt", SURROGATE, "Unicode"),
    ("prompt", ["a"] * 257, "at most 256"),
    ("logprobs", True, "integer"),
    ("logprobs", 21, "less than or equal to 20"),
    ("best_of", 2, "not supported"),
    ("best_of", True, "not supported"),
    ("suffix", "end", "not supported"),
    ("messages", [], "unknown field"),
]


@pytest.mark.parametrize(("field", "value", "says"), BAD_IN_BOTH + BAD_CHAT)
def test_bad_chat_field_is_named(field, value, says):
    error = refusal(ChatCompletionRequest, {**CHAT, field: value})

    assert error.param == field
    assert error.message.startswith(f"'{field}': ")
    assert says in error.message


@pytest.mark.parametrize(("field", "value", "says"), BAD_IN_BOTH + BAD_TEXT)
def test_bad_completion_field_is_named(field, value, says):
    error = refusal(CompletionRequest, {**TEXT, field: value})

    assert error.param == field
    assert says in error.message


@pytest.mark.parametrize(
    ("message", "path", "says"),
    [
        ({"role": "robot", "content": "x"}, "role", "'system', 'developer', 'user'"),
        ({"content": "x"}, "role", "required"),
        ("hi", None, "must be a JSON object"),
        (None, None, "must be a JSON object"),
        ({"role": "user"}, "content", "required"),
        ({"role": "user", "content": 5}, "content", "must be a string"),
        ({"role": "user", "content": []}, "content", "non-empty list"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "content", "only content parts"),
        ({"role": "user", "content": [{"type": "text"}]}, "content", "a text part must be"),
        ({"role": "user", "content": ["hi"]}, "content", "only content parts"),
        ({"role": "user", "content": SURROGATE}, "content", "Unicode"),
        ({"role": "user", "content": "x", "name": 3}, "name", "1 to 64 characters"),
        ({"role": "user", "content": "x", "contnt": "x"}, "contnt", "did you mean 'content'"),
    ],
)
def test_bad_message_is_named_by_its_path(message, path, says):
    error = refusal(ChatCompletionRequest, {**CHAT, "messages": [*CHAT["messages"], message]})

    assert error.param == ("messages.1" if path is None else f"messages.1.{path}")
    assert says in error.message


@pytest.mark.parametrize("body", [[], "x", 3, None])
def test_a_body_must_be_an_object(body):
    assert refusal(ChatCompletionRequest, body).message == "must be a JSON object"


def test_all_faults_are_told_up_to_a_few():
    error = refusal(ChatCompletionRequest, {**CHAT, "n": 0, "top_p": 3, "seed": "a", "min_p": 9})

    assert error.param == "n"
    assert error.message.count("'") >= 6
    assert error.message.endswith("and 1 more")


def test_a_refusal_shows_numbers_but_no_text_of_the_user():
    assert "got 7" in refusal(ChatCompletionRequest, {**CHAT, "temperature": 7}).message
    secret = {"role": "secret-role", "content": ["secret-part"]}
    body = {**CHAT, "messages": [secret], "stop": ["secret-stop", ""], "n": "secret-n"}
    assert "secret" not in refusal(ChatCompletionRequest, body).message


def test_messages_read_well():
    def message(**field):
        return refusal(ChatCompletionRequest, {**CHAT, **field}).message

    assert message(n=0) == "'n': input should be greater than or equal to 1, got 0"
    assert message(stop=[1]) == "'stop': must be a string or a list of strings"
    assert message(audio={}) == "'audio': not supported by this server; remove it"


def test_fastapi_wraps_the_path_in_body():
    class Wrapped:
        def errors(self):
            return [{"type": "missing", "loc": ("body", "model"), "msg": "Field required"}]

    error = from_validation_error(Wrapped())
    assert (error.param, error.message) == ("model", "'model': is required")


def test_conflicting_limits_are_refused_and_equal_ones_are_not():
    body = {**CHAT, "max_tokens": 5}
    assert ChatCompletionRequest.model_validate({**body, "max_completion_tokens": 5})
    error = refusal(ChatCompletionRequest, {**body, "max_completion_tokens": 6})
    assert error.param == "max_completion_tokens"
    assert "max_tokens" in error.message


def test_too_many_choices_over_prompts_are_refused():
    error = refusal(CompletionRequest, {**TEXT, "prompt": ["a"] * 5, "n": 64})

    assert "prompts times n" in error.message


def test_echo_with_logprobs_is_refused_and_says_what_to_do():
    error = refusal(CompletionRequest, {**TEXT, "echo": True, "logprobs": 0})

    assert error.param == "echo"
    assert "remove one of them" in error.message


@pytest.mark.parametrize(
    ("cls", "body", "params", "unsupported"),
    [
        (ChatCompletionRequest, CHAT, chat_params, protocol.UNSUPPORTED_CHAT),
        (CompletionRequest, TEXT, completion_create_params, protocol.UNSUPPORTED_COMPLETION),
    ],
)
def test_every_field_of_the_client_is_decided_on(cls, body, params, unsupported):
    """A field the client library knows is supported, ignored or refused, never 'unknown'."""
    fields = set(params.CompletionCreateParamsBase.__annotations__) | {"stream"}

    assert fields <= set(cls.model_fields) | protocol.IGNORED_FIELDS | set(unsupported)
    nulls = dict.fromkeys(fields - set(body))
    assert cls.model_validate({**nulls, **body}) == cls.model_validate(body)


def test_harmless_values_of_unsupported_fields_are_accepted():
    extra = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "parallel_tool_calls": True,
    }
    assert ChatCompletionRequest.model_validate({**CHAT, **extra}) == (
        ChatCompletionRequest.model_validate(CHAT)
    )
    assert CompletionRequest.model_validate({**TEXT, "best_of": 1, "suffix": ""})


def test_an_answer_can_be_sent_back_as_history():
    answer = ChatCompletionMessage(role="assistant", content="hello").model_dump()
    request = ChatCompletionRequest.model_validate(
        {**CHAT, "messages": [*CHAT["messages"], answer, {"role": "user", "content": "and?"}]}
    )

    assert [m.content for m in request.messages] == ["hi", "hello", "and?"]


def test_text_parts_are_joined_by_line_breaks():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = ChatCompletionRequest.model_validate(
        {**CHAT, "messages": [{"role": "user", "content": parts}]}
    )

    assert request.messages[0].content == "a\nb"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ("a",)),
        ("", ("",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
        (["a", [1]], ("a", (1,))),
    ],
)
def test_prompts_of_all_forms(prompt, prompts):
    assert CompletionRequest.model_validate({**TEXT, "prompt": prompt}).prompt == prompts


def test_values_have_one_shape():
    request = ChatCompletionRequest.model_validate(
        {
            **CHAT,
            "stop": "x",
            "logit_bias": {"7": -100, "3": 1.5},
            "temperature": 0,
            "seed": -(2**63),
            "stream": True,
            "stream_options": {"include_usage": True, "include_obfuscation": False},
        }
    )
    assert request.stop == ("x",)
    assert request.logit_bias == {7: -100.0, 3: 1.5}
    assert request.temperature == 0
    assert request.include_usage
    assert not ChatCompletionRequest.model_validate(CHAT).include_usage


@pytest.mark.parametrize("cls_body", [(ChatCompletionRequest, CHAT), (CompletionRequest, TEXT)])
def test_a_validated_request_can_be_validated_again(cls_body):
    cls, body = cls_body
    full = {**body, "stop": ["a", "b"], "logit_bias": {"3": 1}, "stop_token_ids": [4], "n": 2}
    request = cls.model_validate(full)

    assert cls.model_validate(request.model_dump()) == request


def test_error_body_has_openais_shape_and_hides_foreign_errors():
    ours = InvalidRequestError("bad", param="n", code="invalid_value")
    assert error_body(ours) == {
        "error": {
            "message": "bad",
            "type": "invalid_request_error",
            "param": "n",
            "code": "invalid_value",
        }
    }
    foreign = error_body(ValueError("the user's text"))["error"]
    assert foreign["type"] == "server_error"
    assert "text" not in foreign["message"]


def test_what_clients_add_to_an_answer_may_go_back_into_the_history() -> None:
    """``messages.append(completion.choices[0].message)``, of OpenAI's client or LiteLLM."""
    notes = {"provider_specific_fields": {"refusal": None}}
    function = {"name": "f", "arguments": '{"a": 1}', "parsed_arguments": {"a": 1}, **notes}
    call = {"id": "call_1", "type": "function", "function": function, **notes}
    content = {"content": '{"b": 2}', "parsed": {"b": 2}}
    parsed = {"role": "assistant", **content, "tool_calls": [call], **notes}
    message = ChatCompletionRequest.model_validate({**CHAT, "messages": [parsed]}).messages[0]
    assert message.content == '{"b": 2}'
    assert message.tool_calls[0].function.arguments == {"a": 1}


@pytest.mark.parametrize("kind", ["array", "banana", ["object", "null"]])
def test_parameters_of_a_function_are_an_object(kind: Any) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": kind}}}
    error = refusal(ChatCompletionRequest, {**CHAT, "tools": [tool]})
    assert error.param == "tools.0.function.parameters"
    assert "type 'object'" in error.message


def test_marks_for_a_prompt_cache_change_nothing() -> None:
    hint = {"type": "ephemeral"}
    part = {"type": "text", "text": "a", "cache_control": hint, "prompt_cache_breakpoint": None}
    message = {"role": "user", "content": [part], "cache_control": hint}
    tool = {"type": "function", "function": {"name": "f"}}
    marked = {**CHAT, "messages": [message], "tools": [{**tool, "cache_control": hint}]}
    plain = {**CHAT, "messages": [{"role": "user", "content": "a"}], "tools": [tool]}
    accepted = [ChatCompletionRequest.model_validate(body) for body in (marked, plain)]
    assert accepted[0] == accepted[1]
    message["content"] = [{**part, "x": 1}]
    assert refusal(ChatCompletionRequest, marked).param == "messages.0.content"
