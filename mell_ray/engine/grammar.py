"""Which tokens a grammar allows next.

A grammar is a string in llguidance's own form; what a sequence may continue with is a function of
that string and of its output tokens. So nothing travels with a request that moves, is preempted or
recovered: the new place compiles the grammar, or has it already, and replays the tokens, which
costs about a microsecond each.

Nothing here runs in the engine's thread. Compiling has a thread of its own; masks are computed by
others while the forward runs, and a row whose mask is late is left out of one step's sampling, so
that no grammar however hard slows down the requests beside it. The library lets go of the GIL.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from mell_ray.engine.sequence import Sequence
from mell_ray.errors import InvalidRequestError, MellError

logger = logging.getLogger(__name__)

REMEMBERED = 64  # compiled grammars per process
GRACE_S, ALONE_S = 0.003, 0.05
_MASK_THREADS = 2
_ITS_OPTION = "Enable 'coerce_one_of' option to approximate oneOf with anyOf"

# With these a compilation ends within seconds and a mask within tens of milliseconds, whatever the
# grammar; a lexer state takes 1 to 2 kB.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    max_grammar_size=200_000,
    max_items_in_row=20_000,
    max_lexer_states=20_000,
    step_lexer_fuel=200_000,
    step_max_items=200_000,
    verbose_errors=False,
)


class GrammarCompiler:
    """Compiles grammars for one model's vocabulary and remembers the last ones. Thread-safe.

    :param load_tokenizer: gives the model's Hugging Face tokenizer; called at the first grammar.
    :param vocab_size: width of the logits, or None for the tokenizer's own.
    :param eos_token_ids: the tokens that may follow where the grammar is complete.
    """

    def __init__(
        self,
        load_tokenizer: Callable[[], Any],
        vocab_size: int | None = None,
        eos_token_ids: Iterable[int] | None = None,
    ) -> None:
        self._load_tokenizer = load_tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = None if eos_token_ids is None else list(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._known: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock, self._loading = threading.Lock(), threading.Lock()

    def matcher(self, grammar: str) -> LLMatcher:
        """A matcher of its own for one sequence, at the beginning of its output.

        :raises InvalidRequestError: the grammar is wrong, or too much to compile.
        """
        with self._lock:
            known = self._known.get(grammar)
            if known is not None:
                self._known.move_to_end(grammar)
                return known.deep_copy()
        compiled = LLMatcher(self._wrapped(), grammar, log_level=0, limits=_LIMITS)
        if not compiled.is_error():
            # Whether there is a first token: a rule that only refers to itself has none.
            first = compiled.deep_copy()
            first.compute_bitmask()
            compiled = first if first.is_error() else compiled
        if compiled.is_error():
            raise InvalidRequestError(_reason(compiled.get_error()), param="response_format")
        with self._lock:
            self._known[grammar] = compiled
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
            return compiled.deep_copy()

    def knows(self, grammar: str) -> bool:
        """Whether it is compiled already and costs nothing."""
        return grammar in self._known

    def _wrapped(self) -> LLTokenizer:
        """The library's own form of the tokenizer, which takes a second to make."""
        with self._loading:
            if self._tokenizer is None:
                self._tokenizer = self._wrap(self._load_tokenizer())
            return self._tokenizer

    def _wrap(self, tokenizer: Any) -> LLTokenizer:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise _no_grammars()
        eos = self._eos_token_ids
        if eos is None:
            eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        if not eos:
            raise InvalidRequestError(
                "this model has no end token, which a grammar needs", param="response_format"
            )
        size = max(self._vocab_size or 0, len(tokenizer))
        try:
            return LLTokenizer(backend.to_str(), n_vocab=size, eos_token=eos)
        except ValueError as error:  # a decoder that it cannot tell the bytes of tokens from
            logger.info("the grammar library does not take this tokenizer: %s", error)
            raise _no_grammars() from None


class Constraint:
    """The grammar of one sequence. The engine's thread calls its methods; the matcher is touched
    by one worker at a time, as a mask is asked for only after the one before it was used."""

    def __init__(self, masks: GrammarMasks, matcher: Future[LLMatcher]) -> None:
        self._masks = masks
        self._matcher = matcher
        self._taken = 0  # output tokens that the matcher was or is being told
        self._mask: Future[NDArray[np.bool_]] | None = None

    def begin(self, output_token_ids: list[int]) -> None:
        """Start computing what may follow these tokens, unless that has begun already."""
        if not self._matcher.done() or (self._mask and self._taken == len(output_token_ids)):
            return
        fresh, self._taken = output_token_ids[self._taken :], len(output_token_ids)
        self._mask = self._masks.compute(self._matcher, fresh)

    @property
    def awaited(self) -> Future[Any]:
        """What must be done before there is a mask."""
        return self._mask or self._matcher

    @property
    def late(self) -> bool:
        return self._mask is None or not self._mask.done()

    def error(self) -> str | None:
        """Why there is no mask: the grammar does not compile or became too complex, or the tokens
        do not follow it. Only once it is not ``late``."""
        assert self._mask is not None
        problem = self._mask.exception()
        if problem is None:
            return None
        if isinstance(problem, MellError):
            return problem.message
        logger.error("the grammar library failed", exc_info=problem)
        return "the grammar cannot be used: the server failed to compute what it allows"

    def allowed(self) -> NDArray[np.bool_]:
        """One bool per token, at least as many as the model has. Only without an ``error``."""
        assert self._mask is not None
        return self._mask.result()


class GrammarMasks:
    """The threads that serve all constraints of one engine."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._compiling = ThreadPoolExecutor(1, "mell-grammar-compile")
        self._computing = ThreadPoolExecutor(_MASK_THREADS, "mell-grammar-mask")

    def open(self, grammar: str) -> Constraint:
        return Constraint(self, self._compiling.submit(self._compiler.matcher, grammar))

    def compute(self, matcher: Future[LLMatcher], fresh: list[int]) -> Future[NDArray[np.bool_]]:
        return self._computing.submit(_advance, matcher, fresh)


def wait_for_masks(seqs: list[Sequence], *, alone: bool) -> list[Sequence]:
    """Give late masks a moment; more, where the step has nothing else to show for itself
    (``alone``), but never so long that calls to the engine would feel it. Returns the sequences
    whose masks are late all the same."""
    awaited = [seq.constraint.awaited for seq in seqs if seq.constraint.late]
    if awaited and not wait(awaited, GRACE_S).done and alone:
        wait(awaited, ALONE_S, FIRST_COMPLETED)
    return [seq for seq in seqs if seq.constraint.late]


def _advance(ready: Future[LLMatcher], fresh: list[int]) -> NDArray[np.bool_]:
    matcher = ready.result()
    if fresh:
        matcher.consume_tokens(fresh)
    packed = matcher.compute_bitmask() if not matcher.is_error() else b""
    if matcher.is_error():
        raise InvalidRequestError(_reason(matcher.get_error()), param="response_format")
    return np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little").view(np.bool_)


def _no_grammars() -> InvalidRequestError:
    return InvalidRequestError(
        "this model's tokenizer cannot be constrained by a grammar", param="response_format"
    )


def _reason(error: str) -> str:
    """The library's message without pictures and without hints at options that clients lack."""
    if error.startswith("NoExtension"):
        error = "no text can follow it; look for a definition that only refers to itself"
    lines = error.replace(_ITS_OPTION, "use anyOf instead").splitlines() or ["no reason given"]
    text = lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1].removeprefix('error: ')}"
    return "the grammar cannot be used: " + text
