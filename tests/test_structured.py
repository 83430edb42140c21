"""response_format through OpenAI's own SDK on the embedded base: answers that fit, whole and streamed, or a 400."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel, ConfigDict, Field

from adapterhub.base.embedded import EMBEDDED
from adapterhub.config import MIB, Config
from tests.serving import User, running

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    """A user of the embedded base."""
    data_dir = tmp_path_factory.mktemp("speaker") / "data"
    with running(Config(data_dir=data_dir, device="cpu", device_bytes=16 * MIB, kv_bytes=128 * MIB)) as server:
        yield server.user()


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Eyes(BaseModel):
    model_config = ConfigDict(extra="forbid")

    colour: Colour
    glasses: bool


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern="^[A-Z][a-z]{1,9}$")
    age: int = Field(ge=0, le=150)
    eyes: Eyes
    pet: str | None = Field(max_length=12)


FRIEND: list[Any] = [{"role": "user", "content": "Describe Bob, who is 31, has blue eyes and a cat, as JSON."}]
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "unit": {"enum": ["m", "km"]}},
    "required": ["x", "unit"],
    "additionalProperties": False,
}


def form(schema: Any, *, strict: bool | None = True, name: str = "it") -> Any:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": strict}}


def ask(user: User, **options: Any) -> Any:
    fields = {"model": EMBEDDED, "messages": FRIEND, "max_tokens": 120, "temperature": 0, **options}
    return user.openai.chat.completions.create(**fields)


# -- answers that fit


def test_a_pydantic_model_comes_back_parsed(speaker: User) -> None:
    for seed in range(4):
        answer = speaker.openai.chat.completions.parse(
            model=EMBEDDED, messages=FRIEND, response_format=Person, seed=seed, max_tokens=200
        )
        assert answer.choices[0].finish_reason == "stop"
        assert isinstance(answer.choices[0].message.parsed, Person)
    greedy = speaker.openai.chat.completions.parse(
        model=EMBEDDED, messages=FRIEND, response_format=Person, temperature=0, max_tokens=200
    )
    assert greedy.choices[0].message.parsed is not None
    assert (greedy.choices[0].message.parsed.name, greedy.choices[0].message.parsed.age) == ("Bob", 31)


def test_a_streamed_answer_is_the_whole_one_and_parses_at_its_end(speaker: User) -> None:
    whole = ask(speaker, response_format=form(Person.model_json_schema()))
    with speaker.openai.chat.completions.stream(
        model=EMBEDDED, messages=FRIEND, response_format=Person, temperature=0, max_tokens=120
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion().choices[0]
    assert len(deltas) > 10
    assert final.message.content == "".join(deltas)
    assert final.message.parsed == Person.model_validate_json(whole.choices[0].message.content)


def test_json_object_is_an_object_whatever_is_asked(speaker: User) -> None:
    for text in ("Say hello.", "Write a list of numbers: 1, 2, 3", "```python\nprint(1)"):
        answer = ask(
            speaker,
            messages=[{"role": "user", "content": text}],
            response_format={"type": "json_object"},
            max_tokens=300,
            frequency_penalty=1.5,
        ).choices[0]
        assert answer.message.content.startswith("{")
        if answer.finish_reason == "stop":
            assert isinstance(json.loads(answer.message.content), dict)


def test_a_schema_left_out_is_any_object(speaker: User) -> None:
    fields = {"type": "json_schema", "json_schema": {"name": "anything"}}
    assert ask(speaker, response_format=fields, max_tokens=5).choices[0].message.content.startswith("{")


def test_the_limit_of_tokens_in_the_middle_is_told_as_length(speaker: User) -> None:
    answer = ask(speaker, response_format=form(Person.model_json_schema()), max_tokens=7).choices[0]
    assert answer.finish_reason == "length"
    with pytest.raises(openai.LengthFinishReasonError):
        speaker.openai.chat.completions.parse(model=EMBEDDED, messages=FRIEND, response_format=Person, max_tokens=7)


@pytest.mark.parametrize(
    "options",
    [
        {"n": 3, "temperature": 1.5, "seed": 3},
        {"logprobs": True, "top_logprobs": 4},
        {"frequency_penalty": 2, "presence_penalty": 2},
        {"logit_bias": {"2": 100, "0": 100}},
        {"temperature": 2, "top_p": 0.3, "seed": 9},
        {"extra_body": {"ignore_eos": True}},
        {"extra_body": {"min_tokens": 60}},
        {"stop": ["nothing says this"]},
    ],
    ids=lambda options: " ".join(options),
)
def test_every_way_of_choosing_chooses_what_fits(speaker: User, options: dict[str, Any]) -> None:
    answer = ask(speaker, response_format=form(POINT), **options)
    assert len(answer.choices) == options.get("n", 1)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        Draft202012Validator(POINT).validate(json.loads(choice.message.content))
        if options.get("logprobs"):
            assert "".join(said.token for said in choice.logprobs.content) == choice.message.content
    again = ask(speaker, response_format=form(POINT), **options)
    assert [c.message.content for c in again.choices] == [c.message.content for c in answer.choices]


def test_a_stop_string_ends_the_answer_in_the_middle(speaker: User) -> None:
    answer = ask(speaker, response_format=form(POINT), stop=["unit"]).choices[0]
    assert answer.finish_reason == "stop"
    assert answer.message.content.startswith('{"x":')
    assert "unit" not in answer.message.content


def test_not_strict_follows_what_can_be_followed(speaker: User) -> None:
    odd = {**POINT, "properties": {**POINT["properties"], "x": {"type": "integer", "not": {"const": 5}}}}
    odd["properties"]["unit"] = {"type": "string", "maxLength": 3, "format": "unit-of-length"}
    with pytest.raises(openai.BadRequestError, match="not"):
        ask(speaker, response_format=form(odd))
    for strict in (False, None):
        answer = json.loads(
            ask(speaker, response_format=form(odd, strict=strict), max_tokens=60).choices[0].message.content
        )
        assert isinstance(answer["x"], int)
        assert len(answer["unit"]) <= 3


def test_many_schemas_and_plain_rows_at_once_give_each_what_it_gives_alone(speaker: User) -> None:
    asked: list[dict[str, Any]] = [
        {"response_format": form(POINT)},
        {},
        {"response_format": form(Person.model_json_schema())},
        {"response_format": {"type": "json_object"}, "max_tokens": 30},
        {"temperature": 1, "seed": 4},
        {"response_format": form(POINT), "temperature": 2, "seed": 5, "n": 2},
        {"response_format": form({"type": "array", "items": {"type": "boolean"}, "maxItems": 4})},
        {"messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 40},
    ]
    alone = [[c.message.content for c in ask(speaker, **options).choices] for options in asked]
    with ThreadPoolExecutor(16) as threads:
        together = list(threads.map(lambda options: ask(speaker, **options), asked * 2))
    assert [[c.message.content for c in answer.choices] for answer in together] == alone * 2


# -- schemas that cannot be


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def multiplied(levels: int) -> dict[str, Any]:
    """Alternatives of alternatives, without references: twice as many with each level."""
    pairs = [[{"type": "object", "properties": {f"{c}{i}": {"type": "integer"}}} for c in "xy"] for i in range(levels)]
    return {"allOf": [{"anyOf": pair} for pair in pairs]}


REFUSED: dict[str, tuple[Any, str]] = {
    "unknown type": ({"type": "strin"}, "strin"),
    "properties that are none": ({"type": "object", "properties": 3}, "properties"),
    "nothing fits": ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "nsatisfiable"),
    "unknown keyword": ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    "unknown format": ({"type": "string", "format": "colour"}, "colour"),
    "pattern that is none": ({"type": "string", "pattern": "("}, "unclosed"),
    "look-ahead": ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    "back-reference": ({"type": "string", "pattern": "(a)\\1"}, "backreference"),
    "remote reference": ({"$ref": "http://127.0.0.1:1/x.json"}, "http://127.0.0.1:1/x.json"),
    "reference to a file": ({"$ref": "file:///etc/passwd"}, "file:///etc/passwd"),
    "reference to nothing": ({"$ref": "#/$defs/none"}, "none"),
    "reference to itself": ({"$ref": "#"}, "no answer"),
    "references in a ring": ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        "no answer"),
    "too deep": (deep(40), "64 levels"),
    "too many properties": ({"properties": {f"p{i}": {} for i in range(1001)}}, "1001 properties"),
    "too many alternatives": ({"enum": list(range(5001))}, "5001 alternatives"),
    "a constant too long": ({"const": "x" * 2001}, "2001 characters"),
    "a pattern too long": ({"type": "string", "pattern": "a" * 2001}, "2001 characters"),
    "too many bytes": ({"description": "x" * 140_000}, "up to 131072"),
    "alternatives multiplied": (multiplied(16), "too large"),
    "patterns intersected": (
        {"allOf": [{"type": "string", "pattern": f".*{c}.{{10}}.*"} for c in "abcdefghij"]}, "regex"),
    "a very large multiple": ({"type": "integer", "multipleOf": 982_451_653}, "fuel"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_schema_that_cannot_be_compiled_is_a_400_that_says_why(speaker: User, case: str) -> None:
    schema, words = REFUSED[case]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(speaker, response_format=form(schema, name="mine"), stream=stream)
        error: Any = caught.value.body
        assert (error["code"], error["param"]) == ("invalid_json_schema", "response_format")
        assert error["message"].startswith("Invalid schema for response_format 'mine': ")
        assert words in error["message"]
        assert len(error["message"]) < 500


HOSTILE: dict[str, Any] = {
    "nested stars": {"type": "string", "pattern": "^(a+)+$"},
    "the same twice": {"type": "string", "pattern": "^(a|a)*b$"},
    "counted states": {"type": "string", "pattern": "^(a|b)*a(a|b){20}$"},
    "many states": {"type": "string", "pattern": ".*a.{40}"},
    "repeated often": {"type": "string", "pattern": "^(((a{1,1000}){1,1000}){1,1000}){1,1000}$"},
    "any letter often": {"type": "string", "pattern": "^\\p{L}{1,200}\\w{3,500}$"},
    "longest": {"type": "string", "maxLength": 10**9},
    "very long": {"type": "string", "minLength": 10**7},
    "most items": {"type": "array", "items": {"type": "string"}, "maxItems": 10**9},
    "very many items": {"type": "array", "items": {"type": "string"}, "minItems": 10**9},
    "many constants": {"enum": [f"v{i}" for i in range(5000)]},
    "all may be there": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1000)}},
    "doubled by reference": {
        "$ref": "#/$defs/a0",
        "$defs": {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(30)}
        | {"a30": {"type": "null"}},
    },
    "named apart by patterns": {
        "type": "object",
        "patternProperties": {f"^{c}.*{c}.{{5}}$": {"type": "string"} for c in "abcdefghijklmnop"},
    },
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_schema_is_answered_or_refused_while_others_are_served(speaker: User, case: str) -> None:
    with ThreadPoolExecutor(5) as threads:
        others = [threads.submit(ask, speaker, response_format=form(POINT)) for _ in range(2)]
        others += [threads.submit(ask, speaker, max_tokens=20) for _ in range(2)]
        try:
            hostile = ask(speaker, response_format=form(HOSTILE[case]), max_tokens=40, temperature=1, seed=1).choices[0]
        except openai.BadRequestError as error:
            assert error.code == "invalid_json_schema"  # noqa: PT017
        else:
            if hostile.finish_reason == "stop":
                json.loads(hostile.message.content)
        for other in others:
            assert other.result().choices[0].finish_reason in ("stop", "length")


def test_a_schema_that_takes_too_long_is_refused_and_holds_up_nobody(
    speaker: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = {"type": "object", "properties": {f"slow{i}": {"type": "string"} for i in range(1000)}}
    with monkeypatch.context() as patch:
        patch.setattr("adapterhub.api.structured.COMPILE_SECONDS", 0.02)
        with pytest.raises(openai.BadRequestError, match=r"longer than 0\.02 seconds"):
            ask(speaker, response_format=form(slow))
    assert ask(speaker, response_format=form(POINT)).choices[0].finish_reason == "stop"


def test_what_is_not_a_response_format_is_refused_by_name(speaker: User) -> None:
    cases: list[tuple[Any, str]] = [
        ({"type": "yaml"}, "response_format.type"),
        ({"type": "json_schema"}, "response_format"),
        ({"type": "json_schema", "json_schema": {}}, "response_format.json_schema.name"),
        (form(POINT, name="a b"), "response_format.json_schema.name"),
        (form(POINT, name="x" * 65), "response_format.json_schema.name"),
        (form("object"), "response_format.json_schema.schema"),
    ]
    for value, param in cases:
        body = {"model": EMBEDDED, "messages": FRIEND, "response_format": value}
        answer = speaker.http.post(CHAT, json=body)
        assert answer.status_code == 400, value
        assert answer.json()["error"]["param"] == param


def test_whoever_goes_away_leaves_nothing_behind(speaker: User, tmp_path: Path) -> None:
    """The fixture's server checks at its end that nothing has leaked."""
    for _ in range(3):
        stream = ask(speaker, response_format={"type": "json_object"}, max_tokens=500, stream=True)
        next(iter(stream))
        stream.close()
    assert ask(speaker, response_format=form(POINT)).choices[0].finish_reason == "stop"
