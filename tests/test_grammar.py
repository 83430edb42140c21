"""Grammars below HTTP: what a mask lets through always fits the schema, and the engine follows many at once."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from transformers import AutoTokenizer, PreTrainedModel

from adapterhub.api.structured import schema_part
from adapterhub.base.grammar import Grammar, Grammars, masks
from adapterhub.base.model import Base, load_base
from adapterhub.base.request import Finish, Request, Sampling
from adapterhub.base.sampler import sample
from adapterhub.base.scheduler import Sequence
from adapterhub.base.text import TextCodec
from adapterhub.config import Config
from adapterhub.errors import BadRequest, TooManyRequests
from tests.schemas import schemas
from tests.tiny import Client, kv_bytes, make_ref, serving

END = frozenset({2})
WORD = {"type": "string", "pattern": "^[a-z]{3,9}$"}
PERSON = {
    "type": "object",
    "properties": {"name": WORD, "age": {"type": "integer", "minimum": 0, "maximum": 150}, "tall": {"type": "boolean"}},
    "required": ["name", "age", "tall"],
    "additionalProperties": False,
}
COLOURS = {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 3, "maxItems": 6}


@pytest.fixture(scope="module")
def spoken(base_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A tiny random base that speaks the embedded one's tokens."""
    return load_base(Config(base=str(base_directory), data_dir=tmp_path_factory.mktemp("spoken"), device="cpu"))


@pytest.fixture(scope="module")
def codec(spoken: Base) -> TextCodec:
    return TextCodec(spoken.tokenizer)


@pytest.fixture(scope="module")
def grammars(spoken: Base) -> Iterator[Grammars]:
    made = Grammars(spoken.tokenizer, spoken.end_tokens, spoken.vocabulary)
    yield made
    made.close()


def compiled(grammars: Grammars, schema: dict[str, Any], *, strict: bool = True, owner: str = "") -> Grammar:
    part = schema_part("answer", schema, strict, "it", "it")
    return grammars.compile(owner, [part]).result(timeout=60)


def answer(grammar: Grammar, vocabulary: int, seed: int, **sampling: Any) -> list[int] | None:
    """What a base that has no idea answers; None when that has no end."""
    fields = {"temperature": 1.0, "seed": seed, **sampling}
    sequence = Sequence.of(Request("", [1], Sampling(**fields), grammar=grammar))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(400):
        logits = torch.randn(1, vocabulary, generator=generator) * 3
        [token] = sample(logits, [sequence], END)
        assert token is not None
        if token.id in END:
            return sequence.tokens[1:]
        sequence.tokens.append(token.id)
        sequence.counts[token.id] += 1
        assert sequence.matcher is not None
        sequence.matcher.accept(token.id)
    return None


# -- what is let through


@settings(max_examples=150)
@given(schemas, st.integers(0, 10**6))
def test_whatever_is_drawn_fits_its_schema(
    grammars: Grammars, codec: TextCodec, schema: dict[str, Any], seed: int
) -> None:
    try:
        grammar = compiled(grammars, schema)
    except BadRequest as error:  # what nothing fits is told
        if "nsatisfiable" not in error.message:
            raise
        return
    tokens = answer(grammar, 49152, seed)
    assume(tokens is not None)
    assert tokens is not None
    text = codec.decode(tokens)
    Draft202012Validator(schema).validate(json.loads(text))


TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cn", "Co"]) | st.sampled_from("\n\t\r\b\f"), max_size=20)
LEAVES = st.none() | st.booleans() | st.integers() | TEXTS
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner))


@given(VALUES)
def test_any_object_at_all_can_be_said_on_one_line(grammars: Grammars, codec: TextCodec, value: Any) -> None:
    grammar = compiled(grammars, {"type": "object"})
    for separators in ((", ", ": "), (",", ":")):
        text = json.dumps({"it": value}, separators=separators, ensure_ascii=False)
        at = grammar.start().at
        tokens = codec.encode(text)
        assert at.try_consume_tokens(tokens) == len(tokens), text
        assert at.is_accepting()


def test_penalties_and_biases_choose_among_what_is_let_through(grammars: Grammars, codec: TextCodec) -> None:
    grammar = compiled(grammars, COLOURS)
    for seed, more in enumerate(
        ({"frequency_penalty": 2.0}, {"presence_penalty": -2.0}, {"logit_bias": {5: 100.0, 2: 100.0}}, {"top_p": 0.01})
    ):
        tokens = answer(grammar, 49152, seed, logprobs=3, **more)
        assert tokens is not None
        Draft202012Validator(COLOURS).validate(json.loads(codec.decode(tokens)))


def test_the_end_is_held_back_as_long_as_something_else_may_come(grammars: Grammars, codec: TextCodec) -> None:
    number, colours = compiled(grammars, {"type": "integer", "minimum": 1}), compiled(grammars, COLOURS)
    wanting_to_end: dict[str, Any] = {"logit_bias": {2: 100.0}}
    short, longer = (answer(number, 49152, 1, **wanting_to_end, min_tokens=least) for least in (0, 9))
    assert short is not None
    assert longer is not None
    assert len(short) == 1
    assert len(longer) == 9
    assert answer(number, 49152, 1, **wanting_to_end, ignore_eos=True) is None
    for more in ({"ignore_eos": True}, {"min_tokens": 400}):
        whole = answer(colours, 49152, 1, **wanting_to_end, **more)
        assert whole is not None, "where nothing else may come, it ends all the same"
        Draft202012Validator(COLOURS).validate(json.loads(codec.decode(whole)))


def test_a_row_that_is_not_finite_gets_none_though_most_of_it_is_barred(grammars: Grammars) -> None:
    grammar = compiled(grammars, PERSON)
    logits = torch.randn(2, 49152)
    logits[0, 40_000] = float("nan")
    rows = [Sequence.of(Request("", [1], Sampling(temperature=0), grammar=grammar)) for _ in range(2)]
    first, second = sample(logits, rows, END)
    assert first is None
    assert second is not None


def test_every_row_gets_what_it_gets_alone(grammars: Grammars) -> None:
    made = [None, compiled(grammars, PERSON), None, compiled(grammars, COLOURS), compiled(grammars, WORD)]
    for count in (2, 5, 32):
        logits = torch.randn(count, 49152, generator=torch.Generator().manual_seed(count)) * 3

        def rows(count: int = count) -> list[Sequence]:
            samplings = [Sampling(temperature=i % 3, seed=i, top_p=0.9 if i % 2 else 1.0) for i in range(count)]
            return [Sequence.of(Request("", [1], s, grammar=made[i % 5])) for i, s in enumerate(samplings)]

        together = sample(logits.clone(), rows(), END)
        assert together == [sample(logits[i : i + 1].clone(), [row], END)[0] for i, row in enumerate(rows())]


# -- compiling


def test_a_grammar_is_kept_for_its_owner_alone_until_it_is_worn(grammars: Grammars) -> None:
    first = compiled(grammars, PERSON, owner="one")
    assert compiled(grammars, PERSON, owner="one") is first
    assert compiled(grammars, PERSON, owner="two") is not first
    matcher = first.start()
    while not first.worn:
        matcher.accept(int(masks([matcher])[0].argmax()))
    fresh = compiled(grammars, PERSON, owner="one")
    assert fresh is not first
    assert not fresh.worn


def test_only_so_many_grammars_are_kept(grammars: Grammars) -> None:
    first = compiled(grammars, {"const": "first"})
    for i in range(128):
        compiled(grammars, {"const": i})
    assert compiled(grammars, {"const": 127}) is compiled(grammars, {"const": 127})
    assert compiled(grammars, {"const": "first"}) is not first


def test_one_owner_cannot_keep_the_compiling_threads_to_themselves(grammars: Grammars) -> None:
    hard = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(900)}}
    parts = [schema_part("answer", {**hard, "title": str(i)}, True, "it", "it") for i in range(50)]
    begun = list[Future[Grammar]]()

    def ask_for_all() -> None:
        for part in parts:
            begun.append(grammars.compile("greedy", [part]))

    with pytest.raises(TooManyRequests):
        ask_for_all()
    compiled(grammars, WORD, owner="modest")
    for one in begun:
        one.exception(timeout=60)
    compiled(grammars, {"const": "again"}, owner="greedy")


def test_a_grammar_that_many_ask_for_at_once_is_compiled_once(grammars: Grammars) -> None:
    hard = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(900)}}
    part = schema_part("answer", hard, True, "it", "it")
    begun = [grammars.compile("mira", [part]) for _ in range(16)]
    assert len({id(one.result(timeout=60)) for one in begun}) == 1
    theirs = grammars.compile("teo", [part]).result(timeout=60)
    assert theirs is not begun[0].result(), "each owner has their own"


@pytest.mark.parametrize("kind", ["sentencepiece", "unigram", "byte level"])
def test_tokenizers_of_other_kinds_are_followed(kind: str) -> None:
    tokenizer = made_tokenizer(kind)
    grammars = Grammars(tokenizer, frozenset({tokenizer.eos_token_id}), len(tokenizer) + 7)
    codec = TextCodec(tokenizer)
    grammar = compiled(grammars, PERSON)
    choose = random.Random(3)
    for _ in range(5):
        matcher, tokens = grammar.start(), list[int]()
        while tokens[-1:] != [tokenizer.eos_token_id]:
            bits = masks([matcher])[0]
            may = [t for t in range(len(tokenizer) + 7) if bits[t >> 3] >> (t & 7) & 1]
            tokens.append(choose.choice(may))
            matcher.accept(tokens[-1])
        text = b"".join(map(codec.token_bytes, tokens[:-1])).decode()
        Draft202012Validator(PERSON).validate(json.loads(text))
    grammars.close()


def made_tokenizer(kind: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = 'abcdefghijklmnopqrstuvwxyz0123456789{}[]":, '
    if kind == "byte level":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        inner = Tokenizer(models.BPE({"</s>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, []))
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        words = ["</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        words += [letter.replace(" ", "▁") for letter in letters] + ["name", "age", "tall", "▁true", "false"]
        if kind == "unigram":
            inner = Tokenizer(models.Unigram([(w, -float(i)) for i, w in enumerate(words)], 1, byte_fallback=True))
        else:
            inner = Tokenizer(
                models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
            )
        inner.normalizer = normalizers.Replace(" ", "▁")
        inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


def test_a_base_without_an_end_says_that_it_can_follow_no_schema(spoken: Base) -> None:
    grammars = Grammars(spoken.tokenizer, frozenset(), spoken.vocabulary)
    with pytest.raises(BadRequest, match="no token that ends a text"):
        grammars.compile("", [])
    grammars.close()


# -- in the engine


@pytest.fixture
def mixed(
    spoken: Base, base_model: PreTrainedModel, grammars: Grammars, tmp_path: Path
) -> list[tuple[list[int], dict[str, Any]]]:
    """Prompts and how they are asked: with schemas and without, on the base and on adapters, sampled in many ways."""
    refs = [None, make_ref(base_model, spoken, tmp_path, seed=1), make_ref(base_model, spoken, tmp_path, seed=2, r=3)]
    made = [compiled(grammars, PERSON), None, compiled(grammars, COLOURS), compiled(grammars, WORD)]
    ways: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 5, "logprobs": 2},
        {"temperature": 0.7, "seed": 6, "frequency_penalty": 1.0, "top_p": 0.9},
        {"min_tokens": 12, "ignore_eos": True},
        {"temperature": 1.5, "seed": 7, "logit_bias": {314: 5.0}},
    ]
    choose, asked = random.Random(0), []
    for i in range(18):
        prompt = [choose.randrange(20, 49152) for _ in range(choose.choice([5, 17, 40]))]
        asked.append((prompt, {"adapter": refs[i % 3], "grammar": made[i % 4], "max_tokens": 40, **ways[i % 5]}))
    return asked


def answers(client: Client, asked: list[tuple[list[int], dict[str, Any]]], *, together: bool) -> list[list[int]]:
    names = []
    for i, (prompt, how) in enumerate(asked):
        names.append(client.submit(f"{together} {i}", prompt, owner=f"owner-{i % 2}", **how))
        if not together:
            client.wait_for(names[-1])
    return [client.tokens(name) for name in names]


def test_a_mixed_batch_gives_each_what_it_gets_alone(
    spoken: Base, mixed: list[tuple[list[int], dict[str, Any]]], codec: TextCodec, tmp_path: Path
) -> None:
    with serving(spoken, tmp_path, kv_bytes=kv_bytes(spoken, 256)) as client:
        alone = answers(client, mixed, together=False)
        assert answers(client, mixed, together=True) == alone
        fitting = 0
        for i, tokens in enumerate(alone):
            if i % 4 != 1 and client.heard(f"False {i}")[-1].finish is Finish.STOP:
                Draft202012Validator([PERSON, {}, COLOURS, WORD][i % 4]).validate(json.loads(codec.decode(tokens)))
                fitting += 1
        assert fitting >= 6


def test_who_gives_way_and_is_computed_again_goes_on_in_its_grammar(
    spoken: Base, mixed: list[tuple[list[int], dict[str, Any]]], tmp_path: Path
) -> None:
    with serving(spoken, tmp_path, kv_bytes=kv_bytes(spoken, 256)) as client:
        alone = answers(client, mixed, together=False)
    with serving(spoken, tmp_path, kv_bytes=kv_bytes(spoken, 10)) as client:
        preempt, given_way = client.engine._scheduler.preempt, []

        def counted(victim: Sequence) -> None:
            given_way.append(victim.produced > 0 and victim.matcher is not None)
            preempt(victim)

        client.engine._scheduler.preempt = counted  # type: ignore[method-assign]
        assert answers(client, mixed, together=True) == alone
        assert any(given_way), "the cache was too large for the test to say anything"


def test_a_grammar_that_becomes_too_complex_fails_its_request_alone(
    spoken: Base, grammars: Grammars, tmp_path: Path
) -> None:
    exploding = compiled(grammars, {"type": "string", "pattern": "^(a|b)*a(a|b){40}c$"})
    with serving(spoken, tmp_path) as client:
        bias = dict.fromkeys(spoken.tokenizer.convert_tokens_to_ids(["a", "b"]), 30.0)
        how: dict[str, Any] = {"temperature": 1.0, "seed": 1, "logit_bias": bias, "max_tokens": 200}
        client.submit("exploding", [5, 6, 7], grammar=exploding, **how)
        client.submit("plain", [5, 6, 7], max_tokens=200)
        outputs = client.wait_for("exploding")
        assert len(client.tokens("plain")) == 200 or client.heard("plain")[-1].finish is Finish.STOP
        if outputs[-1].error is not None:
            assert isinstance(outputs[-1].error, BadRequest)
            assert "too complex" in outputs[-1].error.message


def test_a_step_without_grammars_computes_no_mask(
    spoken: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(_: Any) -> None:
        raise AssertionError("a mask was computed")

    monkeypatch.setattr("adapterhub.base.sampler.masks", never)
    with serving(spoken, tmp_path) as client:
        assert client.ask([5, 6, 7], max_tokens=4)


def test_the_tokenizer_of_the_embedded_base_is_followed_byte_for_byte(base_directory: Path, grammars: Grammars) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_directory)
    grammar = compiled(grammars, {"type": "string"})
    for text in ('"grüße 日本 🙂 \\u0001"', '"tab\\tquote\\" back\\\\slash"', '" <|im_end|x> </s>"'):
        at, tokens = grammar.start().at, tokenizer.encode(text, add_special_tokens=False)
        assert at.try_consume_tokens(tokens) == len(tokens)
        assert at.is_accepting()


# -- schemas that mean nothing


KEYWORDS = [
    "type", "properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties",
    "items", "prefixItems", "minItems", "maxItems", "enum", "const", "anyOf", "allOf", "oneOf", "$ref", "$defs",
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength", "pattern",
    "format", "not", "if", "x-guidance", "$schema", "$id",
]  # fmt: skip
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), 1e308, 5e-324, 2**63, -1])
ODD = st.none() | st.booleans() | NUMBERS | st.sampled_from([*KEYWORDS, "string", "#", "#/$defs/a", "[", "a{9999999}"])
GARBAGE = st.recursive(
    ODD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KEYWORDS, "a"]), inner, max_size=4),
)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(KEYWORDS), GARBAGE, max_size=5), st.booleans())
def test_any_object_at_all_as_a_schema_is_followed_or_refused(
    grammars: Grammars, schema: dict[str, Any], strict: bool
) -> None:
    with suppress(BadRequest):
        grammar = compiled(grammars, schema, strict=strict)
        answer(grammar, 49152, 0)
