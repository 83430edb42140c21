"""Tools through OpenAI's own SDK on the embedded base, and how chat templates are told of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import BaseModel, ConfigDict, Field
from transformers import AutoTokenizer

from adapterhub.api.calls import CallReader
from adapterhub.base.embedded import EMBEDDED, base_path
from adapterhub.base.text import TextCodec
from adapterhub.base.tools import BEGIN, END, call_head
from adapterhub.config import MIB, Config
from tests.serving import User, counted, running

ASKED: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]


class Weather(BaseModel):
    """The weather in a city, now."""

    model_config = ConfigDict(extra="forbid")
    city: str = Field(pattern="^[A-Z][a-z]{2,8}$")
    unit: Literal["C", "F"]


class Remember(BaseModel):
    """Keeps a number for later."""

    model_config = ConfigDict(extra="forbid")
    number: int = Field(ge=0, le=999)


WEATHER = openai.pydantic_function_tool(Weather, name="get_weather")
REMEMBER = openai.pydantic_function_tool(Remember, name="remember")
MODELS: dict[str, type[BaseModel]] = {"get_weather": Weather, "remember": Remember}
BOTH: Any = [WEATHER, REMEMBER]
HELLO_TOOL: Any = {"type": "function", "function": {"name": "hello"}}


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    """A user of the embedded base."""
    data_dir = tmp_path_factory.mktemp("speaker") / "data"
    with running(Config(data_dir=data_dir, device="cpu", device_bytes=16 * MIB, kv_bytes=128 * MIB)) as server:
        yield server.user()


def ask(user: User, **options: Any) -> Any:
    fields = {"model": EMBEDDED, "messages": ASKED, "max_tokens": 200, "temperature": 0, "tools": BOTH, **options}
    return user.openai.chat.completions.create(**fields)


def named(name: str) -> Any:
    return {"type": "function", "function": {"name": name}}


def biased_to_call(**more: Any) -> dict[str, Any]:
    """Words with which the base comes to a call by itself: it has never learned to."""
    codec = TextCodec(AutoTokenizer.from_pretrained(base_path(EMBEDDED)))
    return {"logit_bias": dict.fromkeys(map(str, codec.encode("<tool_call>")), 30), **more}


# -- calls, whole and streamed


@pytest.mark.parametrize("seed", range(3))
def test_a_required_call_is_made_and_parses(speaker: User, seed: int) -> None:
    answer = speaker.openai.chat.completions.parse(
        model=EMBEDDED, messages=ASKED, tools=BOTH, tool_choice="required", seed=seed, max_tokens=2000
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls
    for call in choice.message.tool_calls:
        assert call.type == "function"
        assert isinstance(call.function.parsed_arguments, MODELS[call.function.name])
    ids = [call.id for call in choice.message.tool_calls]
    assert len(set(ids)) == len(ids)
    assert all(identity.startswith("call_") for identity in ids)


@pytest.mark.parametrize("name", MODELS)
def test_a_named_function_is_called_once_and_no_other(speaker: User, name: str) -> None:
    for options in ({}, {"parallel_tool_calls": True}, {"temperature": 2, "seed": 3}):
        [call] = ask(speaker, tool_choice=named(name), **options).choices[0].message.tool_calls
        assert call.function.name == name
        MODELS[name].model_validate_json(call.function.arguments)


def test_without_parallel_calls_there_is_one(speaker: User) -> None:
    for seed in range(3):
        answer = ask(speaker, tool_choice="required", parallel_tool_calls=False, temperature=1, seed=seed)
        assert len(answer.choices[0].message.tool_calls) == 1


def test_several_calls_come_in_one_answer(speaker: User) -> None:
    answers = ask(speaker, tool_choice="required", n=8, temperature=1.2, seed=1, max_tokens=400).choices
    assert max(len(choice.message.tool_calls) for choice in answers) > 1


def test_auto_answers_in_words_or_calls(speaker: User) -> None:
    words = ask(speaker, max_tokens=30).choices[0]
    assert words.message.content
    assert words.message.tool_calls is None
    calls = ask(speaker, parallel_tool_calls=False, **biased_to_call()).choices[0]
    assert calls.finish_reason == "tool_calls"
    [call] = calls.message.tool_calls
    MODELS[call.function.name].model_validate_json(call.function.arguments)
    assert BEGIN not in (calls.message.content or "")


def test_none_never_calls(speaker: User) -> None:
    answer = ask(speaker, tool_choice="none", max_tokens=20)
    assert answer.choices[0].message.tool_calls is None
    assert answer.usage.prompt_tokens == ask(speaker, tools=openai.omit, max_tokens=1).usage.prompt_tokens


@pytest.mark.parametrize(
    "options",
    [
        {"tool_choice": "required"},
        {"tool_choice": named("get_weather")},
        {"tool_choice": "required", "n": 3, "temperature": 1, "seed": 2},
        {"parallel_tool_calls": False, "calling": True},
        {"max_tokens": 30},
        {"tool_choice": "required", "logprobs": True},
    ],
    ids=["required", "named", "choices", "auto", "words", "logprobs"],
)
def test_a_stream_says_what_the_whole_answer_says(speaker: User, options: dict[str, Any]) -> None:
    if options.get("calling"):
        options = biased_to_call(parallel_tool_calls=False)
    whole = ask(speaker, **options)
    chunks = list(ask(speaker, stream=True, stream_options={"include_usage": True}, **options))
    assert counted(chunks[-1].usage) == counted(whole.usage)
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason]
        assert "".join(c.delta.content or "" for c in mine) == (choice.message.content or "")
        told: list[dict[str, str]] = []
        pieces = 0
        for delta in (d for c in mine for d in c.delta.tool_calls or []):
            if delta.id:
                assert delta.index == len(told), "calls come in order, and each is named first"
                assert delta.type == "function"
                told.append({"id": delta.id, "name": delta.function.name, "arguments": ""})
            told[delta.index]["arguments"] += delta.function.arguments
            pieces += 1
        calls = choice.message.tool_calls or []
        assert [(t["name"], t["arguments"]) for t in told] == [(c.function.name, c.function.arguments) for c in calls]
        assert not calls or pieces > 2 * len(calls), "arguments come in pieces"
        if options.get("logprobs"):
            said = [t for c in mine if c.logprobs for t in c.logprobs.content]
            assert said == choice.logprobs.content


def test_the_streaming_helper_parses_arguments_as_they_come(speaker: User) -> None:
    with speaker.openai.chat.completions.stream(
        model=EMBEDDED, messages=ASKED, tools=BOTH, tool_choice="required", temperature=0, max_tokens=400
    ) as stream:
        events = [event for event in stream if event.type.startswith("tool_calls.function.arguments")]
        final = stream.get_final_completion().choices[0]
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert [event.name for event in done] == [call.function.name for call in final.message.tool_calls or []]
    for event in done:
        assert isinstance(event.parsed_arguments, MODELS[event.name])
    for one, other in pairwise(e for e in events if e.type.endswith("delta") and e.index == 0):
        assert other.arguments.startswith(one.arguments)


def test_the_limit_of_tokens_in_a_call_is_told_as_length(speaker: User) -> None:
    answer = ask(speaker, tool_choice=named("get_weather"), max_tokens=22).choices[0]
    assert answer.finish_reason == "length"
    [call] = answer.message.tool_calls
    assert call.function.name == "get_weather"
    assert call.function.arguments.startswith("{")
    before = ask(speaker, tool_choice=named("get_weather"), max_tokens=5).choices[0]
    assert (before.finish_reason, before.message.tool_calls, before.message.content) == ("length", None, None)


def test_a_function_without_parameters_is_called_with_none(speaker: User) -> None:
    [call] = ask(speaker, tools=[HELLO_TOOL], tool_choice=named("hello")).choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {}


def test_only_the_allowed_tools_are_called(speaker: User) -> None:
    allowed = {"mode": "required", "tools": [named("remember")]}
    for seed in range(3):
        choice = ask(
            speaker, tool_choice={"type": "allowed_tools", "allowed_tools": allowed}, temperature=1.5, seed=seed
        ).choices[0]
        assert {call.function.name for call in choice.message.tool_calls} == {"remember"}


def test_with_a_response_format_it_is_answered_so_or_called(speaker: User) -> None:
    schema = {"enum": ["<tool_call>", "sunny"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "sky", "schema": schema, "strict": True}}
    words = ask(speaker, response_format=form, logit_bias={"33": 10}).choices[0]
    if words.message.tool_calls is None:
        assert json.loads(words.message.content) in schema["enum"]
    for choice in ask(speaker, response_format=form, n=8, temperature=2, seed=1, max_tokens=400).choices:
        if choice.message.content is not None and choice.finish_reason == "stop":
            Draft202012Validator(schema).validate(json.loads(choice.message.content))
    [call] = ask(speaker, response_format=form, tool_choice=named("remember")).choices[0].message.tool_calls
    Remember.model_validate_json(call.function.arguments)


def test_a_conversation_goes_on_after_a_call(speaker: User) -> None:
    first = speaker.openai.chat.completions.create(
        model=EMBEDDED, messages=ASKED, tools=BOTH, tool_choice="required", temperature=0, max_tokens=400
    )
    message = first.choices[0].message
    results: list[Any] = [
        {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
        for call in message.tool_calls or []
    ]
    history = [*ASKED, message.model_dump(exclude_none=True), *results, {"role": "user", "content": "Thanks."}]
    assert ask(speaker, messages=history, max_tokens=10).choices[0].message.content
    assert ask(speaker, messages=history, tools=openai.omit, max_tokens=10).choices[0].message.content


# -- what is refused


CALL = {"id": "call_1", "type": "function", "function": {"name": "remember", "arguments": "{}"}}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "ok"}
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no such tool": ({"tool_choice": named("fly")}, "tool_choice", "'fly'"),
    "required without tools": ({"tools": [], "tool_choice": "required"}, "tool_choice", "no tools"),
    "named without tools": ({"tools": None, "tool_choice": named("fly")}, "tool_choice", "'fly'"),
    "two of a name": ({"tools": [HELLO_TOOL, HELLO_TOOL]}, "tools", "same name"),
    "too many": ({"tools": [named(f"f{i}") for i in range(129)]}, "tools", "up to 128"),
    "another kind": ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type", "function"),
    "name with a blank": ({"tools": [named("a b")]}, "tools.0.function.name", "pattern"),
    "parameters that are no object": (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
        "tools.0.function.parameters",
        "'object'",
    ),
    "parameters too deep": (
        {"tools": [HELLO_TOOL, {"type": "function", "function": {"name": "f", "parameters": {
            "properties": {"a": json.loads('{"items":' * 70 + "{}" + "}" * 70)}}}}]},
        "tools.1.function.parameters",
        "64 levels",
    ),
    "strict parameters that cannot be": (
        {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {
            "properties": {"a": {"pattern": "(?=a)b", "type": "string"}}, "required": ["a"]}}}]},
        "tools",
        "look-around",
    ),
    "unknown choice": ({"tool_choice": "always"}, "tool_choice", ""),
    "result of nothing": ({"messages": [*ASKED, RESULT]}, "messages.1", "'call_1'"),
    "result without an id": ({"messages": [*ASKED, {"role": "tool", "content": "ok"}]}, "messages.1", "tool_call_id"),
    "the user calls": ({"messages": [{**ASKED[0], "tool_calls": [CALL]}]}, "messages.0", "only the assistant"),
    "a call without a function": (
        {"messages": [*ASKED, {"role": "assistant", "tool_calls": [{"id": "1", "type": "function"}]}]},
        "messages.1.tool_calls.0.function",
        "required",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_a_400_that_names_the_field(speaker: User, case: str) -> None:
    changes, param, words = REFUSED[case]
    body = {"model": EMBEDDED, "messages": ASKED, "tools": BOTH, "max_tokens": 5, **changes}
    answer = speaker.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"].startswith(param)
    assert words in error["message"]


# -- the reader of calls


TEXTS = st.text(st.sampled_from('ab <tool_call>/"\\{}[]\n:'), max_size=12)
ARGUMENTS = st.dictionaries(TEXTS, st.recursive(TEXTS | st.integers(), lambda inner: st.lists(inner, max_size=2)))


@given(TEXTS, st.lists(st.tuples(st.sampled_from(["f", "get_it"]), ARGUMENTS), max_size=3), st.data())
def test_however_an_answer_comes_in_pieces_it_is_read_the_same(
    text: str, calls: list[tuple[str, dict[str, Any]]], data: st.DataObject
) -> None:
    if BEGIN in text:
        text = ""
    arguments = [json.dumps(given_with, ensure_ascii=False) for _, given_with in calls]
    written = [f"{BEGIN}\n{call_head(n)}{a}}}\n{END}" for (n, _), a in zip(calls, arguments, strict=True)]
    answer = text + "\n".join(written)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=12)))
    reader, content, read = CallReader(), "", list[list[str]]()
    for start, end in pairwise([0, *cuts, len(answer)]):
        told = reader.push(answer[start:end])
        content += told.content
        assert len({call["index"] for call in told.calls}) == len(told.calls)
        for call in told.calls:
            if "id" in call:
                read.append([call["function"]["name"], ""])
            read[call["index"]][1] += call["function"]["arguments"]
    content += reader.push("", last=True).content
    assert content == (text.rstrip() if calls else text)
    assert read == [[name, a] for (name, _), a in zip(calls, arguments, strict=True)]
    assert reader.called == bool(calls)


# -- chat templates


HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "I will look.",
        "tool_calls": [{**CALL, "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    {"role": "tool", "tool_call_id": "call_2", "content": "warm"},
]
KNOWS_TOOLS = (
    "{% if tools %}<|im_start|>system\nTools: {% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def codec_with(template: str | None = None) -> TextCodec:
    tokenizer = AutoTokenizer.from_pretrained(base_path(EMBEDDED))
    if template is not None:
        tokenizer.chat_template = template
    return TextCodec(tokenizer)


def test_a_template_that_knows_no_tools_is_told_of_them_in_texts() -> None:
    codec = codec_with()
    assert not codec.writes_tools
    text = codec.render(HISTORY, reply=True, tools=BOTH)
    assert text.startswith("<|im_start|>system\n# Tools\n")
    assert json.dumps(WEATHER) in text
    called = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    assert f"<|im_start|>assistant\nI will look.\n{called}<|im_end|>" in text
    results = "<tool_response>\nsunny\n</tool_response>\n<tool_response>\nwarm\n</tool_response>"
    assert text.endswith(f"<|im_start|>user\n{results}<|im_end|>\n<|im_start|>assistant\n")


def test_the_systems_own_message_comes_before_the_tools() -> None:
    text = codec_with().render([{"role": "system", "content": "Be brief."}, *HISTORY], reply=True, tools=BOTH)
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n")
    assert text.count("<|im_start|>system") == 1


def test_a_template_that_knows_tools_writes_them_itself() -> None:
    codec = codec_with(KNOWS_TOOLS)
    assert codec.writes_tools
    text = codec.render(HISTORY, reply=True, tools=BOTH)
    assert text.startswith("<|im_start|>system\nTools: ")
    assert "# Tools" not in text
    assert "<|im_start|>tool\nsunny<|im_end|>" in text


def test_a_template_that_writes_calls_another_way_is_told_of_tools_in_texts() -> None:
    other = KNOWS_TOOLS.replace("<tool_call>", "[CALL]").replace("</tool_call>", "[/CALL]")
    codec = codec_with(other)
    assert not codec.writes_tools
    assert "<tool_call>\n" in codec.render(HISTORY, reply=True, tools=BOTH)


def test_a_template_without_a_systems_message_gets_the_tools_with_the_first() -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + KNOWS_TOOLS
    codec = codec_with(refusing.replace("tools", "nothing").replace("tool_calls", "nothing"))
    text = codec.render(HISTORY, reply=True, tools=BOTH)
    assert text.startswith("<|im_start|>user\n# Tools\n")
    assert "\n\nWeather?<|im_end|>" in text


def test_without_tools_a_conversation_is_rendered_as_before() -> None:
    codec = codec_with()
    tokenizer = AutoTokenizer.from_pretrained(base_path(EMBEDDED))
    expected = tokenizer.apply_chat_template(HISTORY[:1], tokenize=False, add_generation_prompt=True)
    assert codec.render(HISTORY[:1], reply=True) == expected
