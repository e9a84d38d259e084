"""A request with a grammar: what it may say, and that nothing that happens to it changes that."""

from __future__ import annotations

import itertools
import json
import threading
import time
from functools import cache
from typing import Any

import jsonschema
import pytest
from transformers import AutoTokenizer

from mell_ray.builtin import model_path
from mell_ray.config import BUILTIN_SOURCE
from mell_ray.engine import Engine, LoadedModel, load_model
from mell_ray.engine.grammar import REMEMBERED, GrammarCompiler, GrammarMasks
from mell_ray.engine.types import RequestState
from mell_ray.errors import InvalidRequestError, OutOfBlocksError
from mell_ray.openai.structured import json_grammar
from tests.engine.support import Client, drain, request, small_config, step
from tests.engine.support import engine as random_engine
from tests.engine.test_migration import move_kv, move_tokens

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["tall", "kind", "late"]}, "maxItems": 3},
        "born": {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[12][0-9]{3}$"}]},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age", "tags", "born", "ok"],
    "additionalProperties": False,
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "is": {"enum": ["leaf", "twig"]},
                "of": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1},
            },
            "required": ["is"],
            "additionalProperties": False,
        }
    },
}


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(model_path())


@cache
def model() -> LoadedModel:
    return load_model(BUILTIN_SOURCE, small_config(block_size=16))


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(tokenizer, model().vocab_size, model().eos_token_ids)


def engine(**changes: Any) -> Engine:
    return Engine(model(), small_config(block_size=16, **changes), grammars=compiler())


def ask(name: str, schema: dict[str, Any], max_tokens: int = 120, **sampling: Any) -> RequestState:
    sampling = {"temperature": 1.0, "grammar": json_grammar(schema), **sampling}
    text = "<|user|>Tell me about Emma.<|assistant|>"
    return request(name, tokenizer().encode(text), max_tokens, **sampling)


def text(tokens: list[int]) -> str:
    return tokenizer().decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("schema", [PERSON, TREE], ids=["person", "tree"])
def test_whatever_is_drawn_is_valid(schema: dict[str, Any]) -> None:
    subject = engine(max_num_seqs=24)
    for seed in range(24):
        subject.add(ask(f"r{seed}", schema, 200, seed=seed))
    client = drain(subject)
    assert set(client.finished.values()) == {"stop"}
    answers = {text(tokens) for tokens in client.tokens.values()}
    for answer in answers:
        jsonschema.validate(json.loads(answer), schema)
    assert len(answers) > 10


SAMPLINGS = {
    "top_k": {"top_k": 1},
    "top_p": {"top_p": 0.01},
    "min_p": {"min_p": 0.9},
    "penalties": {"frequency_penalty": 2.0, "presence_penalty": 2.0, "repetition_penalty": 3.0},
    "greedy": {"temperature": 0.0},
    "logprobs": {"logprobs": 3},
    # The end token is wanted at once, and again long after the object is complete.
    "eager to end": {"logit_bias": ((2, 100.0),)},
    "never to end": {"min_tokens": 120, "logit_bias": ((2, -100.0),)},
}


@pytest.mark.parametrize("name", sorted(SAMPLINGS))
def test_the_mask_comes_before_what_narrows_the_choice(name: str) -> None:
    subject = engine()
    for seed in range(4):
        subject.add(ask(f"r{seed}", PERSON, 160, seed=seed, **SAMPLINGS[name]))
    client = drain(subject)
    assert set(client.finished.values()) == {"stop"}
    for request_id, tokens in client.tokens.items():
        jsonschema.validate(json.loads(text(tokens)), PERSON)
        if name == "logprobs":  # of the model, not of what the grammar left
            assert all(len(entry.top) == 3 for entry in client.logprobs[request_id])
            assert all(entry.logprob > float("-inf") for entry in client.logprobs[request_id])


def test_a_stop_token_that_the_grammar_needs_is_drawn_before_min_tokens_without_ending() -> None:
    (brace,) = tokenizer().encode("{", add_special_tokens=False)
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    subject = engine()
    subject.add(ask("r", schema, stop_token_ids=(brace,), min_tokens=2))
    client = drain(subject)
    assert json.loads(text(client.tokens["r"])) == {}


def test_an_answer_cut_by_max_tokens_is_a_beginning() -> None:
    whole, cut = engine(), engine()
    whole.add(ask("r", PERSON, seed=3))
    cut.add(ask("r", PERSON, 9, seed=3))
    expected, client = drain(whole), drain(cut)
    assert client.finished == {"r": "length"}
    assert client.tokens["r"] == expected.tokens["r"][:9]


def test_neighbours_without_a_grammar_keep_their_tokens() -> None:
    alone, mixed = engine(), engine()
    plain = [request(f"p{i}", [1, 7 + i, 40], 30, temperature=1.0, seed=i) for i in range(3)]
    for state in plain:
        alone.add(state)
        mixed.add(state)
    for seed in range(3):
        mixed.add(ask(f"g{seed}", PERSON, seed=seed))
    expected, client = drain(alone), drain(mixed)
    assert {name: client.tokens[name] for name in expected.tokens} == expected.tokens


@pytest.fixture(scope="module", params=["greedy", "seeded"])
def undisturbed(request: pytest.FixtureRequest) -> tuple[list[RequestState], Client]:
    temperature = {"greedy": 0.0, "seeded": 1.0}[request.param]
    states = [
        ask(f"r{seed}", schema, 60, seed=seed, temperature=temperature, logprobs=1)
        for seed, schema in enumerate([PERSON, TREE] * 3)
    ]
    subject = engine()
    for state in states:
        subject.add(state)
    return states, drain(subject)


def test_preemption_changes_no_token(undisturbed: tuple[list[RequestState], Client]) -> None:
    states, expected = undisturbed
    subject = engine(num_gpu_blocks_override=14, enable_prefix_caching=False)
    for state in states:
        subject.add(state)
    client = drain(subject)
    assert subject.stats().preemptions > 0
    assert client.tokens == expected.tokens


@pytest.mark.parametrize("mode", ["kv", "token"])
def test_moves_change_no_token(undisturbed: tuple[list[RequestState], Client], mode: str) -> None:
    """From engine to engine in the middle of strings, numbers and names."""
    states, expected = undisturbed
    engines = [engine(), engine()]
    client, moved = Client(), 0
    for state in states:
        engines[0].add(state)
    move = move_kv if mode == "kv" else move_tokens
    turns = itertools.count()  # as many as it takes: a row whose mask is late waits for a turn
    while any(each.has_work() for each in engines):
        turn = next(turns)
        step(engines, client)
        src, dst = engines[turn % 2], engines[1 - turn % 2]
        owned = [info.request_id for info in src.sequences() if info.status == "running"]
        if owned:
            try:
                move(src, dst, owned[turn % len(owned)], client, turn % 3)
                moved += 1
            except OutOfBlocksError:
                pytest.fail("the pools are large enough for all")
    assert moved > 20
    assert client.tokens == expected.tokens
    assert client.finished == expected.finished


def test_recovery_at_any_token_changes_none(
    undisturbed: tuple[list[RequestState], Client],
) -> None:
    """What an ingress does when a replica died: the tokens it has go to another."""
    states, expected = undisturbed
    subject = engine(max_num_seqs=24)
    tokens, logprobs = expected.tokens["r0"], expected.logprobs["r0"]
    lengths = range(0, len(tokens), 3)
    for have in lengths:
        state = ask(f"at{have}", PERSON, 60)
        state.sampling = states[0].sampling
        state.output_token_ids = tokens[:have]
        state.output_logprobs = logprobs[:have]
        subject.add(state)
    client = Client()
    client.tokens = {f"at{have}": tokens[:have] for have in lengths}
    drain(subject, client)
    assert all(found == tokens for found in client.tokens.values())


def test_tokens_that_do_not_follow_the_grammar_end_that_request_alone() -> None:
    subject = engine()
    wrong = ask("wrong", PERSON)
    wrong.output_token_ids = tokenizer().encode("[1, 2", add_special_tokens=False)
    subject.add(wrong)
    subject.add(ask("right", PERSON))
    client = drain_from(subject, {"wrong": wrong.output_token_ids})
    assert client.finished == {"wrong": "error", "right": "stop"}
    assert "grammar" in (client.errors["wrong"] or "")


def drain_from(subject: Engine, known: dict[str, list[int]]) -> Client:
    client = Client()
    client.tokens = {name: list(tokens) for name, tokens in known.items()}
    return drain(subject, client)


class SlowCompiler(GrammarCompiler):
    """Compiles once it is allowed to."""

    def __init__(self) -> None:
        super().__init__(tokenizer, model().vocab_size, model().eos_token_ids)
        self.allowed = threading.Event()

    def matcher(self, grammar: str) -> Any:
        assert self.allowed.wait(120)
        return super().matcher(grammar)


def test_a_slow_grammar_holds_up_nobody_else() -> None:
    slow = SlowCompiler()
    subject = Engine(model(), small_config(block_size=16), grammars=slow)
    subject.add(ask("slow", PERSON))
    subject.add(request("plain", [1, 7, 40], 30, temperature=1.0))
    client = Client()
    while "plain" not in client.finished:
        step([subject], client)
    assert client.tokens.get("slow", []) == []
    slow.allowed.set()
    drain(subject, client)
    jsonschema.validate(json.loads(text(client.tokens["slow"])), PERSON)


def test_compiling_and_replaying_leave_the_engine_s_thread() -> None:
    names: set[str] = set()

    class Noting(GrammarCompiler):
        def matcher(self, grammar: str) -> Any:
            names.add(threading.current_thread().name)
            return super().matcher(grammar)

    noting = Noting(tokenizer, model().vocab_size, model().eos_token_ids)
    subject = Engine(model(), small_config(block_size=16), grammars=noting)
    subject.add(ask("r", PERSON))
    drain(subject)
    assert names
    assert threading.current_thread().name not in names


def test_compiled_grammars_are_remembered_and_bounded() -> None:
    subject = GrammarCompiler(tokenizer)
    grammars = [json_grammar({"const": i}) for i in range(REMEMBERED + 1)]
    for grammar in grammars:
        subject.matcher(grammar)
    assert not subject.knows(grammars[0])
    assert all(subject.knows(grammar) for grammar in grammars[1:])


def test_sequences_with_one_grammar_do_not_share_a_state() -> None:
    grammar = json_grammar({"enum": ["left", "right"]})
    first, second = compiler().matcher(grammar), compiler().matcher(grammar)
    first.consume_tokens(tokenizer().encode('"left"', add_special_tokens=False))
    assert first.is_accepting()
    assert not second.is_accepting()


def test_a_mask_knows_what_the_tokens_so_far_allow() -> None:
    constraint = GrammarMasks(compiler()).open(json_grammar({"enum": [1, 10]}))
    tokens: list[int] = []
    for allowed in ("1", "0", None):
        deadline = time.monotonic() + 120
        while constraint.late:
            assert time.monotonic() < deadline
            constraint.begin(tokens)
        assert constraint.error() is None
        wanted = 2 if allowed is None else tokenizer().convert_tokens_to_ids(allowed)
        assert constraint.allowed()[wanted]
        tokens.append(wanted)
        constraint.begin(tokens)


def test_an_engine_without_a_compiler_refuses_grammars() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        random_engine().add(request("r", [3], grammar="{}"))
    assert caught.value.param == "response_format"


def test_a_grammar_and_ignore_eos_contradict_each_other() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        engine().add(ask("r", PERSON, ignore_eos=True))
    assert caught.value.param == "ignore_eos"


def test_a_model_without_an_end_token_is_told_so() -> None:
    with pytest.raises(InvalidRequestError, match="no end token"):
        GrammarCompiler(tokenizer, eos_token_ids=()).matcher(json_grammar(PERSON))
