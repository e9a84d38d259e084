"""What a chat request's tools mean for its answer."""

from __future__ import annotations

from dataclasses import dataclass

from mell_ray.errors import InvalidRequestError
from mell_ray.openai.options import NamedTool
from mell_ray.openai.protocol import ChatCompletionRequest
from mell_ray.openai.structured import check_schema_size, response_schema
from mell_ray.openai.tokenizer import Tokenizer
from mell_ray.openai.tool_calls import ToolCallParser, call_id
from mell_ray.openai.tool_formats import ToolFormat


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """How one request's answers may call tools."""

    form: ToolFormat
    names: frozenset[str]  # of the functions that may be called
    marker_ids: frozenset[int]  # special tokens that the parser must see
    parallel: bool  # whether an answer may hold several calls
    grammar: str | None  # of the whole answer, where that is not up to the model
    param: str  # the field to name if the grammar is at fault

    def parser(self, request: str) -> ToolCallParser:
        form = self.form
        return ToolCallParser(
            form, self.names, lambda i: call_id(form, request, i), 0 if self.parallel else 1
        )


def plan_tools(
    request: ChatCompletionRequest, tokenizer: Tokenizer, form: ToolFormat | None
) -> ToolPlan | None:
    """None if nothing may be called.

    A call that the request demands is made by grammar. Where the model is free to call, its text
    is only read, unless a ``response_format`` demands that it be one thing or the other, or a
    function is ``strict``.

    :raises InvalidRequestError: the model has no form of calls, or the tools are too long.
    """
    functions = request.functions
    if not functions:
        return None
    if form is None:
        raise InvalidRequestError(
            f"'tools': the chat template of model '{request.model}' has no form of tool calls that "
            "this server knows; where the model has one all the same, set its tool_call_format",
            param="tools",
        )
    check_schema_size([function.model_dump() for function in functions], "tools")
    demanded = request.demanded
    answer = None if demanded else response_schema(request.response_format)
    callable_ = demanded or functions
    parallel = request.parallel_tool_calls and not isinstance(request.tool_choice, NamedTool)
    grammar = None
    if demanded or answer is not None:
        grammar = form.grammar(callable_, tokenizer, parallel=parallel, answer=answer)
    elif any(function.strict for function in functions):
        if request.ignore_eos:
            raise InvalidRequestError(
                "'ignore_eos': cannot be combined with a strict function, whose call comes to an "
                "end",
                param="ignore_eos",
            )
        grammar = form.free_grammar(functions, tokenizer, parallel=parallel)
    only = len(callable_) == 1 and answer is None
    index = functions.index(callable_[0])
    return ToolPlan(
        form=form,
        names=frozenset(function.name for function in callable_),
        marker_ids=form.marker_ids(tokenizer),
        parallel=parallel,
        grammar=grammar,
        param=f"tools.{index}.function.parameters" if only else "tools",
    )
