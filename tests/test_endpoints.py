"""The table of endpoints: as the code has it, and what it says of each field is what a server does."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from adapterhub.api.reference import CLIENT, IGNORED, OUT, REFUSED, application, client_fields, endpoints, reference
from tests.serving import BASE, User, chat_lines

APP = application()
ENDPOINTS = dict(endpoints(APP))
REFUSALS = [(endpoint, name) for endpoint, fields in REFUSED.items() for name in fields]


def test_the_table_is_up_to_date() -> None:
    assert OUT.read_text() == reference(APP), "run python -m adapterhub.api.reference"


def test_every_endpoint_and_every_field_of_openais_client_is_in_the_table() -> None:
    sections = {
        tuple(section.splitlines()[0].strip("`").split()): section for section in OUT.read_text().split("\n## ")[1:]
    }
    assert sections.keys() == ENDPOINTS.keys()
    for endpoint in CLIENT:
        for name in client_fields(endpoint):
            assert f"\n| `{name}` | " in sections[endpoint], (endpoint, name)


def good(user: User, endpoint: tuple[str, str]) -> dict[str, Any]:
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


def asked(user: User, endpoint: tuple[str, str], fields: dict[str, Any]) -> httpx.Response:
    request = good(user, endpoint)
    if "json" in request:
        request["json"] |= fields
    else:
        flat = {f"{name}[{key}]": value for name, inner in fields.items() for key, value in inner.items()}
        request["data"] |= flat
    return user.http.request(*endpoint, **request)


@pytest.mark.parametrize(("endpoint", "name"), REFUSALS)
def test_what_the_table_says_is_refused_is_refused_with_its_code(
    user: User, endpoint: tuple[str, str], name: str
) -> None:
    refusal = REFUSED[endpoint][name]
    answer = asked(user, endpoint, {name: refusal.example})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, refusal.code, name), answer.text
    assert asked(user, endpoint, {}).status_code == 200


@pytest.mark.parametrize("endpoint", [endpoint for endpoint in CLIENT if endpoint in REFUSED])
def test_what_the_table_says_is_ignored_changes_nothing(user: User, endpoint: tuple[str, str]) -> None:
    section = OUT.read_text().partition(f"## `{' '.join(endpoint)}`\n")[2].partition("\n## ")[0]
    ignored = [row.split("`")[1] for row in section.splitlines() if row.endswith("| ignored | |")]
    assert set(ignored) >= IGNORED.get(endpoint, set())
    assert asked(user, endpoint, dict.fromkeys(ignored, "anything")).status_code == 200


def test_an_endpoint_that_is_not_in_the_table_is_told_to_be_unknown(user: User) -> None:
    answer = user.http.post("/v1/embeddings", json={"model": BASE, "input": "text"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")
