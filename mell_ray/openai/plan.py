"""From a validated request to what the engine needs: one ``Generation`` per choice. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from jinja2.exceptions import TemplateError

from mell_ray.engine.types import SamplingParams
from mell_ray.errors import InvalidRequestError
from mell_ray.openai.messages import Message
from mell_ray.openai.options import FunctionDefinition
from mell_ray.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    Prompt,
)
from mell_ray.openai.sampling import OPENAI_DEFAULTS, SamplingDefaults
from mell_ray.openai.structured import response_grammar
from mell_ray.openai.text import TextStream
from mell_ray.openai.tokenizer import Tokenizer
from mell_ray.openai.tool_calls import ToolCallParser
from mell_ray.openai.tool_formats import ToolFormat
from mell_ray.openai.tool_plan import ToolPlan, plan_tools

Value = TypeVar("Value")

_SEED_MASK = 2**63 - 1
# A template is a program that was written for the messages its author thought of.
_TEMPLATE_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TemplateError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class Generation:
    """One choice: what is sent to a replica and how its tokens become text."""

    prompt_token_ids: list[int]
    sampling: SamplingParams
    stop: tuple[str, ...]
    prompt_index: int
    choice_index: int  # over prompts x n: the ``index`` in the response
    echo: str = ""  # text that the choice begins with (completions with ``echo``)
    tools: ToolPlan | None = None  # what may be called

    def open_text(self, tokenizer: Tokenizer, end_token_ids: Collection[int] = ()) -> TextStream:
        """The stream that turns this choice's tokens into text, with all its settings."""
        ends = () if self.sampling.ignore_eos else end_token_ids
        return TextStream(
            tokenizer,
            self.stop,
            hidden_token_ids=(*self.sampling.stop_token_ids, *ends),
            shown_token_ids=self.tools.marker_ids if self.tools else frozenset(),
            min_tokens=self.sampling.min_tokens,
        )

    def open_tools(self, request_id: str) -> ToolCallParser | None:
        """What finds the tool calls in this choice's text; None if nothing may be called."""
        return self.tools.parser(f"{request_id}/{self.choice_index}") if self.tools else None


@dataclass(frozen=True, slots=True)
class _Limits:
    max_model_len: int
    default_max_tokens: int
    vocab_size: int
    sampling: SamplingDefaults


def plan_chat(
    request: ChatCompletionRequest,
    tokenizer: Tokenizer,
    *,
    max_model_len: int,
    default_max_tokens: int,
    request_seed: int,
    sampling: SamplingDefaults = OPENAI_DEFAULTS,
    tool_format: ToolFormat | None = None,
) -> list[Generation]:
    """One generation per choice of a chat request.

    :param tool_format: how the model writes tool calls; None: it cannot.
    :param max_model_len: prompt and output tokens together are at most that many.
    :param default_max_tokens: output limit where neither the client nor the model names one and
        there is room.
    :param request_seed: seed where the client names none.
    :param sampling: what counts where the client says nothing.
    :raises InvalidRequestError: the messages cannot be rendered or do not fit.
    """
    limits = _Limits(max_model_len, default_max_tokens, len(tokenizer), sampling)
    tools = plan_tools(request, tokenizer, tool_format)
    prompt = tokenizer.encode(_render(request, tokenizer), add_special_tokens=False)
    if not prompt:
        raise InvalidRequestError("the chat template made an empty prompt", param="messages")
    plans = _generations(request, [prompt], [""], "messages", limits, request_seed)
    if tools is None:
        return plans
    return [
        replace(plan, tools=tools, sampling=replace(plan.sampling, grammar=tools.grammar))
        for plan in plans
    ]


def plan_completion(
    request: CompletionRequest,
    tokenizer: Tokenizer,
    *,
    max_model_len: int,
    default_max_tokens: int,
    request_seed: int,
    sampling: SamplingDefaults = OPENAI_DEFAULTS,
) -> list[Generation]:
    """One generation per prompt and choice, prompts first; see ``plan_chat``."""
    limits = _Limits(max_model_len, default_max_tokens, len(tokenizer), sampling)
    prompts = [_tokens(prompt, tokenizer, limits.vocab_size) for prompt in request.prompt]
    echoes = [_echo(prompt, tokenizer) if request.echo else "" for prompt in request.prompt]
    return _generations(request, prompts, echoes, "prompt", limits, request_seed)


def choice_request_id(request_id: str, index: int, total: int) -> str:
    """Engine id of choice ``index`` of ``total`` (prompts x n); the plain id if it is alone."""
    return request_id if total == 1 else f"{request_id}-{index}"


def choice_seed(seed: int, index: int) -> int:
    """Seed of choice ``index``: the seed itself for the first, else a stable 63-bit hash.

    Negative seeds are folded onto the non-negative 63-bit numbers that the engine takes.
    """
    seed &= _SEED_MASK
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & _SEED_MASK


def count_prompt_tokens(generations: Sequence[Generation]) -> int:
    """Prompt tokens for ``usage``: each prompt once, however many choices share it."""
    return sum({g.prompt_index: len(g.prompt_token_ids) for g in generations}.values())


def _render(request: ChatCompletionRequest, tokenizer: Tokenizer) -> str:
    if not tokenizer.chat_template:
        raise InvalidRequestError(
            f"the tokenizer of model '{request.model}' has no chat template; "
            "use /v1/completions instead",
            param="messages",
        )
    messages = [_template_message(message) for message in request.messages]
    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=[_template_tool(function) for function in request.functions] or None,
            add_generation_prompt=True,
            tokenize=False,
        )
    except _TEMPLATE_ERRORS as error:
        raise InvalidRequestError(
            f"the model's chat template refuses these messages: {error}", param="messages"
        ) from error


def _template_message(message: Message) -> dict[str, Any]:
    """As chat templates know it: ``developer`` is the newer name of ``system``."""
    rendered: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.content,
    }
    if message.name is not None:
        rendered["name"] = message.name
    if message.tool_call_id is not None:
        rendered["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        rendered["tool_calls"] = [call.model_dump() for call in message.tool_calls]
    return rendered


def _template_tool(function: FunctionDefinition) -> dict[str, Any]:
    return {
        "type": "function",
        "function": function.model_dump(exclude={"strict"}, exclude_none=True),
    }


def _tokens(prompt: Prompt, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    if not isinstance(prompt, str):
        _check_vocabulary(max(prompt), vocab_size, "prompt")
        return list(prompt)
    tokens = tokenizer.encode(prompt)
    if not tokens and tokenizer.bos_token_id is not None:
        tokens = [tokenizer.bos_token_id]
    if not tokens:
        raise InvalidRequestError(
            "the prompt is empty and the model has no token to start from; "
            "give at least one character",
            param="prompt",
        )
    return tokens


def _echo(prompt: Prompt, tokenizer: Tokenizer) -> str:
    if isinstance(prompt, str):
        return prompt
    return tokenizer.decode(list(prompt), skip_special_tokens=True)


def _check_vocabulary(token_id: int, vocab_size: int, param: str) -> None:
    if token_id >= vocab_size:
        raise InvalidRequestError(
            f"'{param}': token id {token_id} is outside the model's vocabulary of {vocab_size}",
            param=param,
        )


def _generations(
    request: GenerationRequest,
    prompts: list[list[int]],
    echoes: list[str],
    param: str,
    limits: _Limits,
    request_seed: int,
) -> list[Generation]:
    _check_token_fields(request, limits.vocab_size)
    grammar = response_grammar(request.response_format)
    max_tokens = [_max_tokens(request, len(prompt), param, limits) for prompt in prompts]
    generations = []
    for index in range(len(prompts) * request.n):
        prompt_index, sample = divmod(index, request.n)
        # A seed the client names gives each prompt what it gets alone; without one, equal prompts
        # in one request must still give independent samples.
        seed = choice_seed(request_seed, index)
        if request.seed is not None:
            seed = choice_seed(request.seed, sample)
        generations.append(
            Generation(
                prompt_token_ids=prompts[prompt_index],
                sampling=_sampling(
                    request, limits.sampling, max_tokens[prompt_index], seed, grammar
                ),
                stop=request.stop,
                prompt_index=prompt_index,
                choice_index=index,
                echo=echoes[prompt_index],
            )
        )
    return generations


def _check_token_fields(request: GenerationRequest, vocab_size: int) -> None:
    if request.logit_bias:
        _check_vocabulary(max(request.logit_bias), vocab_size, "logit_bias")
    if request.stop_token_ids:
        _check_vocabulary(max(request.stop_token_ids), vocab_size, "stop_token_ids")


def _max_tokens(request: GenerationRequest, prompt_tokens: int, param: str, limits: _Limits) -> int:
    """Output limit of a prompt; it is refused if the limit asked for has no room."""
    room = limits.max_model_len - prompt_tokens
    name, wanted = request.output_limit
    if room < 1:
        raise InvalidRequestError(
            f"'{param}': the prompt has {prompt_tokens} tokens, but the model's context is "
            f"{limits.max_model_len} tokens for prompt and output together; shorten the prompt",
            param=param,
            code="context_length_exceeded",
        )
    asked = max(wanted or 1, request.min_tokens)
    if asked > room:
        name = name if wanted == asked else "min_tokens"
        raise InvalidRequestError(
            f"'{name}': {prompt_tokens} prompt tokens and {asked} output tokens exceed the model's "
            f"context of {limits.max_model_len} tokens; shorten the prompt or set {name} to "
            f"at most {room}",
            param=name,
            code="context_length_exceeded",
        )
    if wanted is None:
        usual = _given(limits.sampling.max_tokens, limits.default_max_tokens)
        return min(max(usual, request.min_tokens), room)
    if request.min_tokens > wanted:
        raise InvalidRequestError(
            f"'min_tokens' ({request.min_tokens}) exceeds '{name}' ({wanted})", param="min_tokens"
        )
    return wanted


def _sampling(
    request: GenerationRequest,
    defaults: SamplingDefaults,
    max_tokens: int,
    seed: int,
    grammar: str | None,
) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_given(request.temperature, defaults.temperature),
        top_p=_given(request.top_p, defaults.top_p),
        top_k=max(_given(request.top_k, defaults.top_k), 0),
        min_p=_given(request.min_p, defaults.min_p),
        seed=seed,
        frequency_penalty=request.frequency_penalty,
        presence_penalty=request.presence_penalty,
        repetition_penalty=_given(request.repetition_penalty, defaults.repetition_penalty),
        logit_bias=tuple(sorted(request.logit_bias.items())),
        min_tokens=request.min_tokens,
        ignore_eos=request.ignore_eos,
        stop_token_ids=request.stop_token_ids,
        logprobs=request.num_logprobs,
        grammar=grammar,
    )


def _given(asked: Value | None, default: Value) -> Value:
    return default if asked is None else asked
