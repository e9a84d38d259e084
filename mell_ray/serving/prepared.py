"""What an ingress knows of a model, and a request that is ready to run on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mell_ray.openai.plan import Generation, count_prompt_tokens
from mell_ray.openai.protocol import ChatCompletionRequest, GenerationRequest
from mell_ray.openai.sampling import OPENAI_DEFAULTS, SamplingDefaults
from mell_ray.openai.tokenizer import Tokenizer
from mell_ray.openai.tool_formats import ToolFormat
from mell_ray.serving.runner import Job


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as the ingress knows it."""

    model_id: str
    tokenizer: Tokenizer
    max_model_len: int
    created: int
    end_token_ids: tuple[int, ...] = ()  # where an answer ends; no text, special tokens or not
    tool_format: ToolFormat | None = None  # None: it cannot call tools
    sampling: SamplingDefaults = OPENAI_DEFAULTS  # where a request leaves them out


@dataclass(frozen=True, slots=True)
class Prepared:
    """A validated request, ready to run."""

    request_id: str
    created: int
    model: ServedModel
    request: GenerationRequest
    generations: Sequence[Generation]
    jobs: Sequence[Job]
    wants_trace: bool = False
    span: Any = None  # OpenTelemetry's; None: not traced

    @property
    def response_id(self) -> str:
        """The ``id`` of the response body, with OpenAI's prefix."""
        prefix = "chatcmpl" if isinstance(self.request, ChatCompletionRequest) else "cmpl"
        return f"{prefix}-{self.request_id}"

    def trace(self) -> dict[str, Any]:
        """Where the time of each choice went, once all have ended."""
        return {
            "request_id": self.request_id,
            "choices": [
                {"index": generation.choice_index, **job.clock.breakdown()}
                for generation, job in zip(self.generations, self.jobs, strict=True)
            ],
        }

    @property
    def prompt_tokens(self) -> int:
        return count_prompt_tokens(self.generations)
