"""The table of endpoints: as the code has it, and what it says of each field is what a server does."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from adapterhub.api import compatibility
from adapterhub.api.compatibility import (
    BESIDES,
    CHAT,
    CLIENT,
    COMPLETIONS,
    CREATE_JOB,
    HYPERPARAMETERS,
    IGNORED,
    REFUSED,
    Endpoint,
    client_fields,
    unsaid,
)
from adapterhub.api.reference import OUT, application, endpoints, reference
from tests.serving import BASE, User, chat_lines

APP = application()
ENDPOINTS = dict(endpoints(APP))
REFUSALS = [(endpoint, name) for endpoint, fields in REFUSED.items() for name in fields]


def test_the_table_is_up_to_date() -> None:
    assert OUT.read_text() == reference(APP), "run python -m adapterhub.api.reference"


def sections() -> dict[Endpoint, dict[str, str]]:
    """By endpoint and field, what the file says: supported, ignored, or what a refusal looks like."""
    found: dict[Endpoint, dict[str, str]] = {}
    for section in OUT.read_text().split("\n## ")[1:]:
        heading, *lines = section.splitlines()
        method, path = heading.strip("`").split()
        rows = [line.split("|") for line in lines if line.startswith("| `")]
        found[method, path] = {row[1].strip(" `"): row[2].strip() for row in rows}
    return found


def test_every_endpoint_is_in_the_table() -> None:
    assert sections().keys() == ENDPOINTS.keys()


@pytest.mark.parametrize("endpoint", CLIENT)
def test_of_every_field_that_openais_client_may_send_the_table_says_what_becomes_of_it(endpoint: Endpoint) -> None:
    said = sections()[endpoint]
    for name in client_fields(endpoint):
        way = [".".join(name.split(".")[:end]) for end in range(1, name.count(".") + 2)]
        of_all_within = [said[above] for above in way[:-1] if above in said and said[above] != "supported"]
        assert name in said or of_all_within or (set(way) & BESIDES.get(endpoint, {}).keys()), name


def test_the_clients_fields_are_found_however_deep_and_in_every_kind_of_list_and_union() -> None:
    """By name, as somebody who reads the SDK's types finds them."""
    assert {
        "stream",
        "verbosity",
        "stream_options.include_obfuscation",
        "messages.content.image_url.url",
        "messages.tool_calls.function.arguments",
        "messages.refusal",
        "tools.custom.format.grammar.syntax",
        "prompt_cache_options.ttl",
    } <= set(client_fields(CHAT))
    assert {"method.dpo.hyperparameters.beta", "integrations.wandb.project"} <= set(client_fields(CREATE_JOB))


def test_a_field_of_which_nothing_is_said_fails_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    left = {name: why for name, why in IGNORED[CHAT].items() if name != "prediction"}
    monkeypatch.setitem(compatibility.IGNORED, CHAT, left)
    assert unsaid(CHAT, sections()[CHAT].keys() - {"prediction"})[0] == "prediction"
    with pytest.raises(LookupError, match="what becomes of prediction, "):
        reference(APP)


def test_the_clients_hyperparameters_are_known() -> None:
    sent = {name.rpartition(".")[2] for name in client_fields(CREATE_JOB) if ".hyperparameters." in f".{name}"}
    reinforcement = {"compute_multiplier", "eval_interval", "eval_samples", "reasoning_effort"}
    assert sent - reinforcement <= set(HYPERPARAMETERS)


def good(user: User, endpoint: Endpoint) -> dict[str, Any]:
    """What makes a request to the endpoint a good one."""
    match endpoint:
        case (_, "/v1/files"):
            return {"data": {"purpose": "user_data"}, "files": {"file": ("a.txt", b"text")}}
        case (_, "/v1/uploads"):
            return {"json": {"bytes": 3, "filename": "a", "mime_type": "text/plain", "purpose": "user_data"}}
        case (_, "/v1/fine_tuning/jobs"):
            return {"json": {"model": BASE, "training_file": user.upload(chat_lines())}}
        case (_, "/v1/chat/completions"):
            messages = [{"role": "user", "content": "Hello"}]
            return {"json": {"model": BASE, "messages": messages, "max_tokens": 1}}
        case (_, "/v1/completions"):
            return {"json": {"model": BASE, "prompt": "Hello", "max_tokens": 1}}
    raise AssertionError(f"say what a good request to {endpoint} is")


def asked(user: User, endpoint: Endpoint, fields: dict[str, Any]) -> httpx.Response:
    request = good(user, endpoint)
    if "json" in request:
        request["json"] |= fields
    else:
        flat = {f"{name}[{key}]": value for name, inner in fields.items() for key, value in inner.items()}
        request["data"] |= flat
    return user.http.request(*endpoint, **request)


@pytest.mark.parametrize(("endpoint", "name"), REFUSALS)
def test_what_the_table_says_is_refused_is_refused_with_its_code(user: User, endpoint: Endpoint, name: str) -> None:
    refusal = REFUSED[endpoint][name]
    fields = {name.split(".")[0]: refusal.example}
    if name.startswith("stream_options"):
        fields["stream"] = True
    answer = asked(user, endpoint, fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, refusal.code, refusal.param or name), (
        answer.text
    )
    assert asked(user, endpoint, {}).status_code == 200


WITHIN: dict[str, Any] = {  # for fields within others, the outermost with the field in it
    "messages.name": [{"role": "user", "content": "Hello", "name": "mira"}],
    "messages.content.prompt_cache_breakpoint": [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hello", "prompt_cache_breakpoint": {"mode": "explicit"}}],
        }
    ],
}


@pytest.mark.parametrize(
    ("endpoint", "name"), [(endpoint, name) for endpoint, told in IGNORED.items() for name in told]
)
def test_what_the_table_says_is_ignored_changes_nothing(user: User, endpoint: Endpoint, name: str) -> None:
    plain = good(user, endpoint)["json"] | {"temperature": 0}
    fields = {name.split(".")[0]: WITHIN.get(name, "anything")}
    assert sections()[endpoint][name] == "ignored"
    with_it = asked(user, endpoint, {"temperature": 0, **fields})
    without = user.http.request(*endpoint, json=plain)
    assert (with_it.status_code, without.status_code) == (200, 200), with_it.text
    if endpoint == CHAT:
        assert with_it.json()["choices"] == without.json()["choices"]
        for counted in ("prompt_tokens", "completion_tokens"):  # the second finds the first one's prompt in the cache
            assert with_it.json()["usage"][counted] == without.json()["usage"][counted]


@pytest.mark.parametrize(
    ("endpoint", "name", "value"),
    [
        (CHAT, "service_tier", "default"),
        (CHAT, "service_tier", "auto"),
        (CHAT, "verbosity", "medium"),
        (CHAT, "reasoning_effort", "none"),
        (CHAT, "store", False),
        (CHAT, "modalities", ["text"]),
        (CHAT, "functions", []),
        (CHAT, "messages", [{"role": "user", "content": "a", "refusal": None, "audio": None, "function_call": None}]),
        (COMPLETIONS, "suffix", ""),
        (CREATE_JOB, "integrations", []),
        (CREATE_JOB, "method", {"type": "supervised", "supervised": None, "dpo": None}),
    ],
)
def test_a_refused_field_may_say_what_is_so_anyway(user: User, endpoint: Endpoint, name: str, value: Any) -> None:
    assert asked(user, endpoint, {name: value}).status_code == 200
    assert asked(user, endpoint, {name: None}).status_code == (400 if name == "messages" else 200)


@pytest.mark.parametrize(
    ("method", "param"),
    [
        ({"type": "supervised", "dpo": {"hyperparameters": {"beta": 0.5}}}, "method.dpo"),
        ({"type": "dpo", "dpo": {"beta": 0.5}}, "method.dpo.beta"),
        ({"type": "supervised", "supervised": {"hyperparameters": {"epochs": 3}}}, "hyperparameters.epochs"),
        ({"type": "supervised", "supervised": []}, "method.supervised"),
        ({"type": "dpo", "dpo": {"hyperparameters": 1}}, "method.dpo.hyperparameters"),
    ],
)
def test_a_method_says_nothing_in_vain(user: User, method: dict[str, Any], param: str) -> None:
    answer = asked(user, CREATE_JOB, {"method": method})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_an_endpoint_that_is_not_in_the_table_is_told_to_be_unknown(user: User) -> None:
    answer = user.http.post("/v1/embeddings", json={"model": BASE, "input": "text"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")
