"""Whatever is wrong with a request: the status, OpenAI's error shape, a message that helps, and nothing stored."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
import torch
from fastapi import FastAPI
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from transformers import PreTrainedModel

from adapterhub.config import MIB
from adapterhub.train.records import MAX_LINE_BYTES
from tests.serving import (
    BASE,
    CONTEXT,
    MAX_FILE,
    PeftFiles,
    Server,
    User,
    chat_lines,
    eventually,
    running,
    small_config,
)

HELLO = [{"role": "user", "content": "Hello there"}]
CHAT, PLAIN, JOBS = "/v1/chat/completions", "/v1/completions", "/v1/fine_tuning/jobs"


def refused(answer: httpx.Response, status: int, code: str, *words: str, param: str | type | None = str) -> str:
    """Checks one refusal; `words` must be in its message, which is returned. `param` is not looked at unless given."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"].startswith("req-")
    body = answer.json()
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code, error
    kinds = {429: "rate_limit_error", 500: "server_error", 504: "server_error", 507: "server_error"}
    assert error["type"] == kinds.get(status, "invalid_request_error")
    assert param is str or error["param"] == param, error
    assert all(word in error["message"] for word in words), error
    assert 10 < len(error["message"]) < 1000
    return error["message"]


@pytest.fixture(autouse=True)
def nothing_is_stored(request: pytest.FixtureRequest) -> Iterator[None]:
    """No refusal leaves a file behind or changes a list of `user`'s."""
    if "user" not in request.fixturenames:
        yield
        return
    server: Server = request.getfixturevalue("server")
    user: User = request.getfixturevalue("user")
    stored = server.stored()
    yield
    assert server.stored() == stored
    assert user.openai.files.list().data == []
    assert user.openai.fine_tuning.jobs.list().data == []
    assert user.http.get("/v1/adapters").json()["data"] == []
    assert [m.id for m in user.openai.models.list()] == [BASE]


@pytest.fixture
def owner(server: Server) -> User:
    """One who has files and jobs, unlike `user`."""
    return server.user()


# -- who asks

ROUTES = [
    ("GET", "/v1/models"),
    ("GET", f"/v1/models/{BASE}"),
    ("DELETE", f"/v1/models/{BASE}"),
    ("GET", "/v1/files"),
    ("POST", "/v1/files"),
    ("GET", "/v1/files/file-1"),
    ("GET", "/v1/files/file-1/content"),
    ("DELETE", "/v1/files/file-1"),
    ("GET", JOBS),
    ("POST", JOBS),
    ("GET", f"{JOBS}/ftjob-1"),
    ("POST", f"{JOBS}/ftjob-1/cancel"),
    ("GET", f"{JOBS}/ftjob-1/events"),
    ("POST", CHAT),
    ("POST", PLAIN),
    ("GET", "/v1/adapters"),
    ("POST", "/v1/adapters"),
    ("GET", "/v1/adapters/a"),
    ("GET", "/v1/adapters/a/download"),
    ("DELETE", "/v1/adapters/a"),
]
ADMIN_ROUTES = [("GET", "/admin/tiers"), ("GET", "/admin/adapters"), ("POST", "/admin/adapters/a/evict")]


def body_for(path: str) -> dict[str, Any]:
    """A body without fault, so that only the key is wrong."""
    return {
        "/v1/files": {"data": {"purpose": "fine-tune"}, "files": {"file": ("a.jsonl", chat_lines())}},
        "/v1/adapters": {"data": {"name": "a"}, "files": {"config": ("c", b"{}"), "weights": ("w", b"x")}},
        JOBS: {"json": {"model": BASE, "training_file": "file-1"}},
        CHAT: {"json": {"model": BASE, "messages": HELLO, "max_tokens": 1}},
        PLAIN: {"json": {"model": BASE, "prompt": "a", "max_tokens": 1}},
    }.get(path, {})


@pytest.mark.parametrize(("method", "path"), [*ROUTES, *ADMIN_ROUTES])
def test_every_route_needs_a_key_that_is_right(server: Server, method: str, path: str) -> None:
    stored = server.stored()
    body = body_for(path) if method == "POST" else {}
    with httpx.Client(base_url=server.url) as http:
        bare = http.request(method, path, **body)
        refused(bare, 401, "missing_api_key", "Authorization: Bearer", "adapterhub keys create")
        for value in ("Basic abc", "Bearer", "sk-ah-x"):
            refused(http.request(method, path, headers={"Authorization": value}, **body), 401, "missing_api_key")
        for key in ("sk-ah-wrong", "\xff\xfe", "x" * 5000):
            headers = {"Authorization": f"Bearer {key}".encode("latin-1")}
            refused(http.request(method, path, headers=headers, **body), 401, "invalid_api_key")
    assert server.stored() == stored


@pytest.mark.parametrize(("method", "path"), ADMIN_ROUTES)
def test_admin_routes_need_an_admin_key(user: User, method: str, path: str) -> None:
    refused(user.http.request(method, path), 403, "insufficient_permissions", "--admin")


def test_an_upload_is_not_taken_in_from_those_without_a_key(server: Server) -> None:
    """The answer is there before the body is, which never comes."""
    where = urlsplit(server.url)
    head = b"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=b\r\n"
    with socket.create_connection((where.hostname, where.port), timeout=60) as connection:
        connection.sendall(head + b"content-length: 5000000\r\n\r\n--b\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 401")


def test_the_sdk_raises_the_class_of_each_status(server: Server, user: User) -> None:
    with pytest.raises(openai.AuthenticationError, match="not valid"):
        server.as_user("nobody", "wrong").openai.models.list()
    with pytest.raises(openai.NotFoundError, match="does not exist") as missing:
        user.ask("nobody/nothing")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    assert missing.value.request_id is not None
    with pytest.raises(openai.BadRequestError, match="temperature"):
        user.ask(BASE, temperature=9)


# -- what belongs to somebody else


@pytest.fixture(scope="module")
def victim(server: Server, adapter: PeftFiles) -> User:
    """An owner with a file, a job and an adapter, which nobody else may see."""
    user = server.user()
    user.import_adapter(adapter, "mine")
    user.job(user.train(chat_lines(), n_epochs=1), "succeeded")
    return user


def same_as_unknown(user: User, method: str, path: str, theirs: str, unknown: str, code: str, **body: Any) -> None:
    """Asks for somebody else's and for what there is not: the answers must be alike in every letter but the name."""
    messages = []
    for name in (theirs, unknown):
        text = json.dumps(body).replace("NAME", name)
        options = {"json": json.loads(text)} if body else {}
        answer = user.http.request(method, path.replace("NAME", name.replace("/", "%2F")), **options)
        messages.append(refused(answer, 404, code).replace(name, "NAME"))
    assert messages[0] == messages[1]


def test_anothers_model_is_as_unknown_as_one_that_is_not(user: User, victim: User) -> None:
    alias, version = [m.id for m in victim.openai.models.list()][1:3]
    for theirs, unknown in ((alias, f"{victim.owner}/nothing"), (version, f"ft:{BASE}:{victim.owner}:mine:abc")):
        chat: Any = {"model": "NAME", "messages": HELLO}
        same_as_unknown(user, "POST", CHAT, theirs, unknown, "model_not_found", **chat)
        same_as_unknown(user, "POST", CHAT, theirs, unknown, "model_not_found", **chat, stream=True)
        same_as_unknown(user, "POST", PLAIN, theirs, unknown, "model_not_found", model="NAME", prompt="a")
        for method in ("GET", "DELETE"):
            same_as_unknown(user, method, "/v1/models/NAME", theirs, unknown, "model_not_found")
        same_as_unknown(user, "POST", JOBS, theirs, unknown, "model_not_found", model="NAME", training_file="file-1")
    assert victim.ask(alias)
    assert victim.ask(version)


def test_an_owner_cannot_use_anothers_version_under_their_own_name(user: User, victim: User) -> None:
    version = [m.id for m in victim.openai.models.list()][2].rpartition(":")[2]
    body = {"model": f"ft:{BASE}:{user.owner}:mine:{version}", "messages": HELLO}
    refused(user.http.post(CHAT, json=body), 404, "model_not_found", param="model")


def test_anothers_file_is_as_unknown_as_one_that_is_not(user: User, victim: User) -> None:
    theirs = victim.openai.files.list(purpose="fine-tune").data[0].id
    for method, path in (("GET", "NAME"), ("GET", "NAME/content"), ("DELETE", "NAME")):
        same_as_unknown(user, method, f"/v1/files/{path}", theirs, "file-1", "not_found")
    same_as_unknown(user, "POST", JOBS, theirs, "file-1", "not_found", model=BASE, training_file="NAME")
    answer = user.http.post(JOBS, json={"model": BASE, "training_file": theirs})
    refused(answer, 404, "not_found", param="training_file")
    assert victim.openai.files.content(theirs).read() == chat_lines()


def test_anothers_job_is_as_unknown_as_one_that_is_not(user: User, victim: User) -> None:
    theirs = victim.openai.fine_tuning.jobs.list().data[0].id
    for method, path in (
        *(("GET", f"NAME{part}") for part in ("", "/events", "/checkpoints")),
        *(("POST", f"NAME/{change}") for change in ("cancel", "pause", "resume")),
    ):
        same_as_unknown(user, method, f"{JOBS}/{path}", theirs, "ftjob-1", "not_found")
    refused(user.http.get(f"{JOBS}?after={theirs}"), 400, "invalid_value", param="after")


def test_anothers_adapter_is_as_unknown_as_one_that_is_not(user: User, victim: User) -> None:
    theirs = victim.http.get("/v1/adapters").json()["data"][0]["id"]
    for method, path in (("GET", "NAME"), ("GET", "NAME/download"), ("DELETE", "NAME")):
        same_as_unknown(user, method, f"/v1/adapters/{path}", theirs, "adapter-1", "not_found")
    assert victim.http.get(f"/v1/adapters/{theirs}").status_code == 200


# -- inference


def chat(user: User, **changes: Any) -> httpx.Response:
    return user.http.post(CHAT, json={"model": BASE, "messages": HELLO, "max_tokens": 2, **changes})


def plain(user: User, **changes: Any) -> httpx.Response:
    return user.http.post(PLAIN, json={"model": BASE, "prompt": "Once", "max_tokens": 2, **changes})


UNSUPPORTED: list[tuple[Callable[..., httpx.Response], str, Any]] = [
    (chat, "functions", [{"name": "f"}]),
    (chat, "function_call", {"name": "f"}),
    (chat, "modalities", ["text", "audio"]),
    (chat, "audio", {"voice": "alloy", "format": "wav"}),
    (chat, "web_search_options", {}),
    (chat, "reasoning_effort", "high"),
    (chat, "verbosity", "low"),
    (chat, "store", True),
    (plain, "suffix", "The end."),
]


@pytest.mark.parametrize(("ask", "name", "value"), UNSUPPORTED)
def test_a_field_that_is_known_but_not_supported_is_refused_by_name(
    user: User, ask: Callable[..., httpx.Response], name: str, value: Any
) -> None:
    for streaming in (False, True):
        answer = ask(user, **{name: value}, stream=streaming)
        refused(answer, 400, "unsupported_parameter", f"{name} is not supported", param=name)


BAD_FIELDS: list[tuple[Callable[..., httpx.Response], dict[str, Any], str, str]] = [
    (chat, {"n": 0}, "n", "greater than or equal to 1"),
    (chat, {"n": 17}, "n", "less than or equal to 16"),
    (chat, {"top_logprobs": 3}, "top_logprobs", "logprobs=true"),
    (chat, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    (chat, {"frequency_penalty": 2.5}, "frequency_penalty", "less than or equal to 2"),
    (chat, {"presence_penalty": -3}, "presence_penalty", "greater than or equal to -2"),
    (chat, {"logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal to 100"),
    (chat, {"logit_bias": {"49152": 1}}, "logit_bias", "49152"),
    (plain, {"logprobs": 21}, "logprobs", "less than or equal to 20"),
    (chat, {"temperature": 2.1}, "temperature", "less than or equal to 2"),
    (chat, {"temperature": -0.1}, "temperature", "greater than or equal to 0"),
    (chat, {"top_p": 1.1}, "top_p", "less than or equal to 1"),
    (chat, {"top_p": -1}, "top_p", "greater than or equal to 0"),
    (chat, {"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    (chat, {"max_completion_tokens": -1}, "max_completion_tokens", "greater than or equal to 1"),
    (chat, {"seed": 1.5}, "seed", "integer"),
    (chat, {"stop": ""}, "stop", "at least 1 character"),
    (chat, {"stop": ["a"] * 5}, "stop", "up to 4"),
    (chat, {"stop": 5}, "stop", "valid string"),
    (chat, {"stream": "maybe"}, "stream", "boolean"),
    (chat, {"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
    (chat, {"model": 5}, "model", "valid string"),
    (chat, {"messages": []}, "messages", "at least 1"),
    (chat, {"messages": "Hello"}, "messages", "list"),
    (chat, {"messages": ["Hello"]}, "messages.0", "object"),
    (chat, {"messages": [{"role": "user"}]}, "messages.0", "needs a content"),
    (chat, {"messages": [{"role": "boss", "content": "x"}]}, "messages.0.role", "'assistant'"),
    (chat, {"messages": [{"content": "x"}]}, "messages.0.role", "required"),
    (chat, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "valid string"),
    (chat, {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages.0.content.0.text", ""),
    (chat, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0", "'image_url'"),
    (plain, {"prompt": ""}, "prompt", "empty"),
    (plain, {"prompt": []}, "prompt", "0 prompts"),
    (plain, {"prompt": ["a"] * 65}, "prompt", "1 to 64"),
    (plain, {"prompt": [[]]}, "prompt", "empty"),
    (plain, {"prompt": [49152]}, "prompt", "49152"),
    (plain, {"prompt": [-1]}, "prompt.0", "greater than or equal to 0"),
    (plain, {"prompt": {"a": 1}}, "prompt", "valid"),
]


@pytest.mark.parametrize(("ask", "changes", "param", "words"), BAD_FIELDS)
def test_a_field_out_of_its_limits_is_refused_with_the_limit(
    user: User, ask: Callable[..., httpx.Response], changes: dict[str, Any], param: str, words: str
) -> None:
    refused(ask(user, **changes), 400, "invalid_value", words, param=param)


def test_what_does_not_fit_into_the_context_is_refused_with_the_numbers(user: User) -> None:
    long = [{"role": "user", "content": "word " * CONTEXT}]
    for answer in (
        chat(user, messages=long),
        chat(user, messages=long, stream=True),
        chat(user, max_tokens=CONTEXT),
        chat(user, max_tokens=None, max_completion_tokens=10**9),
        plain(user, prompt=[5] * CONTEXT, max_tokens=1),
        plain(user, prompt=["a", [5] * 600] and [[5], [5] * 600]),
        plain(user, max_tokens=CONTEXT),
    ):
        refused(answer, 400, "context_length_exceeded", f"{CONTEXT} tokens", "max_tokens")


@pytest.mark.parametrize("body", [{"messages": [{"role": "user", "content": "a" * 10**6}]}, {"prompt": "a" * 10**6}])
def test_a_text_that_cannot_fit_is_refused_before_it_is_made_tokens(
    server: Server, user: User, monkeypatch: pytest.MonkeyPatch, body: dict[str, Any]
) -> None:
    monkeypatch.setattr(server.hub.codec, "encode", lambda *_, **__: pytest.fail("it was encoded"))
    [field] = body
    answer = user.http.post(CHAT if field == "messages" else PLAIN, json={"model": BASE, **body})
    refused(answer, 400, "context_length_exceeded", f"{CONTEXT} tokens", "1000", param=field)


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_refused_before_anything_is_sent(user: User, stream: bool) -> None:
    for name in ("gpt-4o", "", "a/b", "ft:", "ft:tiny:x:y:z", "a\0b", "x" * 1000, "../../etc/passwd", "' or 1=1 --"):
        refused(chat(user, model=name, stream=stream), 404, "model_not_found", "GET /v1/models", param="model")


# -- bodies


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        (b"{bad", "invalid_json", "not valid JSON"),
        (b"", "invalid_value", "required"),
        (b"[]", "invalid_value", "object"),
        (b'{"model": "\xff"}', "invalid_json", "UTF-8"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid_json", "deeper than the 100"),
        (b'{"model": "tiny", "max_tokens": ' + b"9" * 5000 + b"}", "invalid_json", "digits"),
        (b'{"model": "\\ud83d"}', "invalid_value", "text"),
        (b'{"\\ud83d": 1}', "invalid_value", "text"),
        (b'{"model": "tiny", "metadata": {"a": "\xed\xa0\x80"}}', "invalid_json", "UTF-8"),
    ],
    ids=["broken", "empty", "array", "not utf-8", "deep", "long number", "half", "half key", "half in bytes"],
)
@pytest.mark.parametrize("path", [CHAT, PLAIN, JOBS])
def test_a_body_that_is_not_json_text_is_refused(user: User, path: str, body: bytes, code: str, words: str) -> None:
    answer = user.http.post(path, content=body, headers={"content-type": "application/json"})
    refused(answer, 400, code, words)


def test_a_number_that_is_none_is_refused(user: User) -> None:
    for field, number in (("temperature", "NaN"), ("top_p", "Infinity"), ("max_tokens", "1e400")):
        body = json.dumps({"model": BASE, "messages": HELLO, field: 0}).replace(": 0", f": {number}")
        answer = user.http.post(CHAT, content=body, headers={"content-type": "application/json"})
        refused(answer, 400, "invalid_value", param=field)


def test_a_body_that_is_too_large_is_refused_with_the_limit(user: User) -> None:
    for path in (CHAT, PLAIN, JOBS):
        answer = user.http.post(path, content=b" " * (9 * MIB), headers={"content-type": "application/json"})
        refused(answer, 413, "request_too_large", "8.0 MiB")


def test_unknown_urls_and_wrong_methods_are_refused_in_the_same_shape(user: User) -> None:
    for path in ("/", "/v1", "/v1/nothing", f"{JOBS}/ftjob-1/start", "/v1/images/generations", "/v1/files/a/b/c"):
        refused(user.http.get(path), 404, "unknown_url", path)
    for method, path in (("PUT", "/v1/files"), ("GET", CHAT), ("DELETE", JOBS), ("PATCH", "/v1/adapters/a")):
        refused(user.http.request(method, path), 405, "bad_request", method, path)


def test_wrong_pages_are_refused(user: User) -> None:
    for path in ("/v1/files", JOBS):
        refused(user.http.get(f"{path}?limit=0"), 400, "invalid_value", param="limit")
        refused(user.http.get(f"{path}?limit=many"), 400, "invalid_value", param="limit")
        refused(user.http.get(f"{path}?after=nothing"), 400, "invalid_value", "'nothing'", param="after")
    refused(user.http.get("/v1/files?order=up"), 400, "invalid_value", "'asc' or 'desc'", param="order")


def test_the_base_cannot_be_deleted(user: User) -> None:
    refused(user.http.delete(f"/v1/models/{BASE}"), 400, "invalid_value", "base")


# -- uploads


def upload(user: User, content: bytes = b"x", name: str = "a.jsonl", **fields: str) -> httpx.Response:
    return user.http.post("/v1/files", data={"purpose": "fine-tune", **fields}, files={"file": (name, content)})


def test_bad_uploads_are_refused(user: User) -> None:
    refused(upload(user, b""), 400, "empty_file", "empty", param="file")
    refused(upload(user, purpose="fun"), 400, "invalid_value", "'fun'", "fine-tune", param="purpose")
    expiries: list[tuple[str | None, str | None, str]] = [
        ("created_at", None, "seconds"),
        (None, "3600", "anchor"),
        ("last_active_at", "3600", "anchor"),
        ("created_at", "3599", "seconds"),
        ("created_at", "2592001", "seconds"),
        ("created_at", "soon", "seconds"),
    ]
    for anchor, seconds, wrong in expiries:
        fields = {"anchor": anchor, "seconds": seconds}
        given = {f"expires_after[{name}]": value for name, value in fields.items() if value is not None}
        refused(upload(user, **given), 400, "invalid_value", param=f"expires_after.{wrong}")
    refused(upload(user, expires_after="3600"), 400, "invalid_value", param="expires_after.anchor")
    refused(user.http.post("/v1/files", data={"purpose": "fine-tune"}), 400, "invalid_value", param="file")
    refused(user.http.post("/v1/files", files={"file": ("a", b"x")}), 400, "invalid_value", param="purpose")
    refused(user.http.post("/v1/files", json={"purpose": "fine-tune"}), 400, "invalid_value", param="file")
    text = {"purpose": "fine-tune", "file": "a text"}
    refused(user.http.post("/v1/files", data=text), 400, "invalid_value", param="file")
    no_boundary = {"content-type": "multipart/form-data"}
    refused(user.http.post("/v1/files", content=b"--x", headers=no_boundary), 400, "bad_request", "boundary")


def test_an_upload_over_the_limit_is_refused_with_the_limit(user: User) -> None:
    refused(upload(user, b"x" * (MAX_FILE + 1)), 413, "request_too_large", "6.0 MiB", param="file")
    refused(upload(user, b"x" * (MAX_FILE + 2 * MIB)), 413, "request_too_large", "7.0 MiB")


@pytest.mark.parametrize(
    "name", ["../../../etc/passwd", "..\\..\\boot.ini", "/etc/passwd", "a\0b\x1b[31m", "..", "\\ud800", "x" * 5000]
)
def test_a_filename_is_only_ever_shown(server: Server, owner: User, name: str) -> None:
    """The header is written by hand: a client library would encode what is odd in it."""
    before = {p for p in server.data_dir.parent.rglob("*") if p.is_file()}
    head = f'--b\r\ncontent-disposition: form-data; name="file"; filename="{name}"\r\n\r\nabc\r\n'
    body = f'{head}--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n--b--\r\n'
    kind = "multipart/form-data; boundary=b; charset=unicode_escape"
    answer = owner.http.post("/v1/files", content=body.encode(), headers={"content-type": kind})
    if answer.status_code == 400:  # the header itself may be refused
        refused(answer, 400, "bad_request")
        return
    made = answer.raise_for_status().json()
    assert not set(made["filename"]) & set("/\\\0\x1b")
    assert 0 < len(made["filename"]) <= 255
    new = {p for p in server.data_dir.parent.rglob("*") if p.is_file()} - before
    assert {p for p in new if not p.name.startswith("hub.db")} == {server.hub.config.uploads_dir / made["id"]}
    assert owner.openai.files.content(made["id"]).read() == b"abc"


# -- jobs


def create(user: User, file: str, **fields: Any) -> httpx.Response:
    """As text, since a JSON library may not write NaN."""
    body = json.dumps({"model": BASE, "training_file": file, **fields})
    return user.http.post(JOBS, content=body, headers={"content-type": "application/json"})


BAD_JOBS: list[tuple[dict[str, Any], str, str]] = [
    ({"suffix": "a/b"}, "suffix", "letters, digits"),
    ({"suffix": "a:b"}, "suffix", "letters, digits"),
    ({"suffix": "x" * 65}, "suffix", "1 to 64"),
    ({"suffix": "größe"}, "suffix", "letters, digits"),
    ({"suffix": "../x"}, "suffix", "beginning"),
    ({"suffix": "x\n"}, "suffix", "letters"),
    ({"seed": -1}, "seed", "greater than or equal to 0"),
    ({"seed": 2**31}, "seed", "less than"),
    ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", "16"),
    ({"metadata": {"a": 5}}, "metadata.a", "string"),
    ({"metadata": {"a": "x" * 513}}, "metadata.a", "512"),
    ({"integrations": [{"type": "wandb"}]}, "integrations", "not supported"),
    ({"priority": "urgent"}, "priority", "'low', 'normal' or 'high'"),
    ({"method": {"type": "reinforcement", "reinforcement": {}}}, "method.type", "'supervised' and 'dpo'"),
    ({"method": {}}, "method.type", "'supervised' and 'dpo'"),
    ({"method": {"type": "dpo", "dpo": {"hyperparameters": []}}}, "method.dpo.hyperparameters", "object"),
    ({"hyperparameters": {"beta": 0.1}}, "hyperparameters.beta", "dpo alone"),
    ({"method": {"type": "supervised", "supervised": []}}, "method.supervised", "object"),
    (
        {"method": {"type": "supervised", "supervised": {"hyperparameters": 5}}},
        "method.supervised.hyperparameters",
        "object",
    ),
    *(
        ({"hyperparameters": {name: value}}, f"hyperparameters.{name}", words)
        for name, value, words in [
            ("n_epochs", 0, "from 1 to 100"),
            ("n_epochs", 101, "from 1 to 100"),
            ("n_epochs", 1.5, "a whole number"),
            ("n_epochs", True, "a whole number"),
            ("n_epochs", "many", '"auto"'),
            ("batch_size", 0, "from 1 to 256"),
            ("batch_size", 257, "from 1 to 256"),
            ("learning_rate_multiplier", 0, "from 0.0001 to 100"),
            ("learning_rate_multiplier", float("nan"), "nan"),
            ("learning_rate_multiplier", float("inf"), "inf"),
            ("learning_rate_multiplier", float("-inf"), "-inf"),
            ("rank", 65, "from 1 to 64"),
            ("rank", [[]], "a whole number"),
            ("max_steps", 0, "from 1 to"),
            ("targets", [], "q_proj"),
            ("targets", ["nothing"], "q_proj"),
            ("targets", "q_proj", "q_proj"),
            ("warmup", 5, "n_epochs, batch_size"),
        ]
    ),
]


@pytest.mark.parametrize(("fields", "param", "words"), BAD_JOBS)
def test_a_job_with_a_field_out_of_its_limits_is_not_made(
    owner: User, fields: dict[str, Any], param: str, words: str
) -> None:
    file = owner.upload(chat_lines())
    refused(create(owner, file, **fields), 400, "invalid_value", words, param=param)
    if "hyperparameters" in fields:
        method = {"type": "supervised", "supervised": fields}
        refused(create(owner, file, method=method), 400, "invalid_value", words, param=param)
    assert owner.openai.fine_tuning.jobs.list().data == []


def test_a_job_needs_a_base_and_a_file_for_training(owner: User, adapter: PeftFiles) -> None:
    file = owner.upload(chat_lines())
    refused(create(owner, file, model="gpt-4o"), 404, "model_not_found", f"'{BASE}'", param="model")
    owner.import_adapter(adapter, "mine")
    mine = f"{owner.owner}/mine"
    for fields, param in (
        ({"rank": 8}, "hyperparameters.rank"),
        ({"alpha": 3}, "hyperparameters.alpha"),
        ({"targets": ["q_proj"]}, "hyperparameters.targets"),
    ):
        answer = create(owner, file, model=mine, hyperparameters=fields)
        refused(answer, 400, "invalid_value", "has settled it", param=param)
    other = owner.upload(chat_lines(), purpose="user_data")
    for param in ("training_file", "validation_file"):
        for unfit, status, code, words in (
            ("file-1", 404, "not_found", "'file-1'"),
            (other, 400, "invalid_value", "'user_data'"),
        ):
            answer = owner.http.post(JOBS, json={"model": BASE, "training_file": file, param: unfit})
            refused(answer, status, code, words, param=param)
    twice = create(owner, file, validation_file=file, hyperparameters={"held_out": 0.1})
    refused(twice, 400, "invalid_value", "nothing is held out", param="hyperparameters.held_out")
    assert owner.openai.fine_tuning.jobs.list().data == []


def turns(*messages: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"messages": messages, **more}).encode() + b"\n"


ASK, SAY = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
BAD_LINES: dict[str, tuple[bytes, str]] = {
    "broken": (b'{"messages": [}\n', "not JSON"),
    "cut off": (b'{"messages": [{"role": "user"', "not JSON"),
    "array": (b"[1, 2]\n", "a JSON list, not an object"),
    "number": (b"5\n", "a JSON int, not an object"),
    "neither": (b'{"text": "a"}\n', "neither 'messages' nor 'prompt'"),
    "messages text": (b'{"messages": "a"}\n', "a list with at least one message"),
    "no messages": (turns(), "a list with at least one message"),
    "message text": (b'{"messages": ["a"]}\n', "messages[0] is not an object"),
    "bad role": (turns({"role": "boss", "content": "a"}, SAY), "messages[0] has the role 'boss'"),
    "long role": (turns({"role": "x" * 100_000, "content": "a"}, SAY), "messages[0] has the role 'xxx"),
    "no role": (turns({"content": "a"}, SAY), "messages[0] has the role None"),
    "no assistant": (turns(ASK), "no assistant message"),
    "unlearned": (turns(ASK, {**SAY, "weight": 0}), "no assistant message"),
    "weight 2": (turns(ASK, {**SAY, "weight": 2}), "messages[1] has the weight 2"),
    "weight of user": (turns({**ASK, "weight": 0}, SAY), "messages[0] has the weight 0"),
    "no content": (turns(ASK, {"role": "assistant"}), "messages[1] needs a text"),
    "number content": (turns(ASK, {"role": "assistant", "content": 5}), "messages[1] needs a text"),
    "image content": (
        turns({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, SAY),
        "messages[0] needs a text",
    ),
    "tools": (turns(ASK, SAY, tools=[{"type": "function"}]), "it has 'tools'"),
    "tool calls": (turns(ASK, {**SAY, "tool_calls": [{}]}), "messages[1] has 'tool_calls'"),
    "completion": (b'{"prompt": "a", "completion": ""}\n', "the completion not empty"),
    "prompt": (b'{"prompt": 5, "completion": "a"}\n', "must be texts"),
    "latin-1": ('{"prompt": "ü", "completion": "a"}\n'.encode("latin-1"), "not UTF-8"),
    "half": (b'{"prompt": "\\ud83d", "completion": "a"}\n', "surrogates"),
    "deep": (b'{"messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}\n", "recursion"),
    "too long": (b'{"prompt": "' + b"x" * MAX_LINE_BYTES + b'", "completion": "a"}\n', "longer than 4194304 bytes"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_fails_the_job_with_its_number_and_the_reason(owner: User, case: str) -> None:
    line, words = BAD_LINES[case]
    job = owner.job(owner.train(chat_lines(11) + line, suffix="mine"), "failed")
    assert job.error is not None
    assert (job.error.code, job.error.param) == ("invalid_training_file", "training_file")
    assert "Line 12 of the training file cannot be used: " in job.error.message
    assert words in job.error.message
    assert len(job.error.message) < 500
    [event] = [e for e in owner.openai.fine_tuning.jobs.list_events(job.id) if e.level == "error"]
    assert event.message == job.error.message
    assert (job.fine_tuned_model, job.trained_tokens) == (None, None)
    assert job.finished_at is not None
    assert [m.id for m in owner.openai.models.list()] == [BASE]


@pytest.mark.parametrize("count", [1, 5, 9])
def test_too_few_examples_fail_the_job_in_openais_words(owner: User, count: int) -> None:
    job = owner.job(owner.train(chat_lines(count)), "failed")
    message = f"Training file has {count} example(s), but must have at least 10 examples"
    assert job.error is not None
    assert job.error.to_dict() == {"code": "invalid_n_examples", "message": message, "param": "training_file"}
    [event] = [e for e in owner.openai.fine_tuning.jobs.list_events(job.id) if e.level == "error"]
    assert event.message == message


def test_a_file_of_blank_lines_has_no_examples(owner: User) -> None:
    job = owner.job(owner.train(b"\n \r\n\t\n"), "failed")
    assert job.error is not None
    assert job.error.message == "Training file has 0 example(s), but must have at least 10 examples"


def test_an_image_as_a_training_file_fails_at_its_first_line(owner: User) -> None:
    job = owner.job(owner.train(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)) * 40), "failed")
    assert job.error is not None
    assert job.error.code == "invalid_training_file"
    assert "Line 1 of the training file cannot be used: it is not UTF-8 text" in job.error.message


def test_a_byte_order_mark_blank_lines_and_windows_line_ends_are_accepted(owner: User) -> None:
    content = b"\xef\xbb\xbf\r\n" + chat_lines(10).replace(b"\n", b"\r\n\r\n")
    owner.job(owner.train(content, max_steps=1), "succeeded")
    owner.job(owner.train(b"\xef\xbb\xbf" + chat_lines(10).rstrip(b"\n"), max_steps=1), "succeeded")


# -- imports


def imported(user: User, files: PeftFiles, name: str = "mine", **changes: bytes) -> httpx.Response:
    upload = dict(files.upload)
    for part, content in changes.items():
        upload[part] = (part, content)
    return user.http.post("/v1/adapters", data={"name": name}, files=upload)


BAD_CONFIGS: list[tuple[bytes | dict[str, Any], str, str]] = [
    (b"{", "invalid_adapter", "not JSON"),
    (b"\xff", "invalid_adapter", "not JSON"),
    (b"[]", "invalid_adapter", "JSON object"),
    (b"[" * 50_000, "invalid_adapter", "not JSON"),
    (b"", "invalid_adapter", "not JSON"),
    ({"peft_type": "IA3"}, "unsupported_adapter", "'IA3'"),
    ({"use_dora": True}, "unsupported_adapter", "DoRA"),
    ({"bias": "all"}, "unsupported_adapter", "bias='all'"),
    ({"lora_bias": True}, "unsupported_adapter", "LoRA biases"),
    ({"modules_to_save": ["lm_head"]}, "unsupported_adapter", "modules_to_save"),
    ({"init_lora_weights": "pissa"}, "unsupported_adapter", "'pissa'"),
    ({"new_magic": 5}, "unsupported_adapter", "new_magic"),
    ({"r": 8}, "invalid_adapter", "rank 4"),
    ({"rank_pattern": {"q_proj": 2}}, "invalid_adapter", "rank 4"),
    ({"r": "big"}, "invalid_adapter", "positive r"),
    ({"lora_alpha": float("nan")}, "invalid_adapter", "positive lora_alpha"),
    ({"alpha_pattern": {"(((": 1}}, "invalid_adapter", "'((('"),
]


@pytest.mark.parametrize(("change", "code", "words"), BAD_CONFIGS)
def test_a_configuration_that_cannot_be_served_is_refused(
    user: User, adapter: PeftFiles, change: bytes | dict[str, Any], code: str, words: str
) -> None:
    config = change if isinstance(change, bytes) else json.dumps({**json.loads(adapter.config), **change}).encode()
    refused(imported(user, adapter, config=config), 400, code, words)


def test_a_message_may_quote_what_is_no_text(user: User, adapter: PeftFiles) -> None:
    config = adapter.config.rstrip()[:-1] + b', "\\ud800": 1}'
    refused(imported(user, adapter, config=config), 400, "unsupported_adapter", "not known here")


def test_weights_that_cannot_be_served_are_refused(user: User, adapter: PeftFiles) -> None:
    tensors = load_safetensors(adapter.weights)
    name = next(key for key in tensors if "lora_A" in key)

    def changed(**more: torch.Tensor) -> bytes:
        return save_safetensors({**tensors, **{k.replace("NAME", name): v for k, v in more.items()}})

    for weights, code, words in (
        (changed(NAME=tensors[name] * float("nan")), "invalid_adapter", "NaN"),
        (changed(NAME=tensors[name] / 0), "invalid_adapter", "infinite"),
        (changed(NAME=tensors[name][:, :-1].contiguous()), "wrong_base", "another base"),
        (changed(NAME=tensors[name][:-1].contiguous()), "invalid_adapter", "do not fit together"),
        (changed(NAME=tensors[name].int()), "invalid_adapter", "int32"),
        (changed(extra=torch.zeros(1)), "unsupported_adapter", "'extra'"),
        (save_safetensors({name: tensors[name]}), "invalid_adapter", "both A and B"),
        (save_safetensors({}), "invalid_adapter", "no tensors"),
        (
            save_safetensors({k.replace("layers.1", "layers.7"): v for k, v in tensors.items()}),
            "wrong_base",
            "layers.7",
        ),
        (b"\x80\x04\x95" + b"x" * 100, "invalid_adapter", "pickle"),
        (b"PK\x03\x04" + b"x" * 100, "invalid_adapter", "pickle"),
        (adapter.weights[:-5], "invalid_adapter", "not a safetensors file"),
        (b"", "invalid_adapter", "not a safetensors file"),
        (b"\xff" * 100, "invalid_adapter", "not a safetensors file"),
    ):
        refused(imported(user, adapter, weights=weights), 400, code, words)


def test_an_adapter_exported_for_another_base_is_refused(user: User, adapter: PeftFiles) -> None:
    tensors = load_safetensors(adapter.weights)
    weights = save_safetensors(tensors, metadata={"format": "pt", "adapterhub_base": "0" * 64})
    refused(imported(user, adapter, weights=weights), 400, "wrong_base", "000000000000")


@pytest.mark.parametrize("name", ["../up", "a/b", "a:b", "..", ".x", "x" * 65, "x\n", "größe", "%2e%2e", "a b"])
def test_a_name_that_cannot_be_part_of_a_models_name_is_refused(user: User, adapter: PeftFiles, name: str) -> None:
    refused(imported(user, adapter, name=name), 400, "invalid_value", "not a valid name", param="name")


def test_an_import_without_all_its_parts_or_over_the_limit_is_refused(user: User, adapter: PeftFiles) -> None:
    config, weights = adapter.upload["config"], adapter.upload["weights"]
    post = user.http.post
    refused(post("/v1/adapters", files=adapter.upload), 400, "invalid_value", param="name")
    refused(post("/v1/adapters", data={"name": ""}, files=adapter.upload), 400, "invalid_value", param="name")
    refused(post("/v1/adapters", data={"name": "a"}, files={"weights": weights}), 400, "invalid_value", param="config")
    refused(post("/v1/adapters", data={"name": "a"}, files={"config": config}), 400, "invalid_value", param="weights")
    refused(imported(user, adapter, config=b" " * (MIB + 1)), 413, "request_too_large", "1.0 MiB")
    refused(imported(user, adapter, weights=b" " * (MAX_FILE + 1)), 413, "request_too_large", "6.0 MiB")
    refused(imported(user, adapter, weights=b" " * (MAX_FILE + MIB)), 413, "request_too_large", "7.0 MiB")


# -- when it is too much, or the server's fault


def test_one_request_too_many_is_told_to_come_back(base_directory: Path, tmp_path: Path) -> None:
    with running(small_config(base_directory, tmp_path, max_batch=2, max_waiting=1)) as server:
        user = server.user()
        for n, stream in ((4, False), (4, True), (16, True)):  # each answer counts
            answer = chat(user, n=n, stream=stream, max_tokens=100)
            refused(answer, 429, "queue_full", "Try again")
            assert answer.headers["retry-after"] == "1"
        with pytest.raises(openai.RateLimitError):
            user.ask(BASE, n=4)
        eventually(lambda: (s := server.engine_stats())["running"] == s["waiting"] == 0)
        assert chat(user, n=3).is_success, "nothing of the refused ones is left in the queue"


def test_an_answer_that_takes_too_long_ends_with_an_error(base_directory: Path, tmp_path: Path) -> None:
    with running(small_config(base_directory, tmp_path, request_seconds=0.01)) as server:
        user = server.user()
        refused(chat(user, max_tokens=400), 504, "deadline_exceeded", "0.01 seconds", "fewer tokens")
        eventually(lambda: server.engine_stats()["running"] == 0)


def test_a_failure_amid_a_stream_is_its_last_event(base_directory: Path, tmp_path: Path) -> None:
    with running(small_config(base_directory, tmp_path, request_seconds=0.5)) as server:
        user = server.user()
        user.train(chat_lines(200), batch_size=1, n_epochs=100)  # so that the answer takes its time
        with pytest.raises(openai.APIError, match="not complete within") as failed:
            for _ in user.openai.chat.completions.create(model=BASE, messages=HELLO, stream=True):
                pass
        assert failed.value.code == "deadline_exceeded"
        text = chat(user, stream=True, max_tokens=None).text
        assert text.rstrip().rpartition("\n\n")[2].startswith('data: {"error":{')
        assert "[DONE]" not in text


def test_a_damaged_adapter_fails_its_own_requests_only(
    server: Server, owner: User, adapter: PeftFiles, base_model: PreTrainedModel, tmp_path: Path
) -> None:
    stored = server.stored()
    damaged = owner.import_adapter(PeftFiles(base_model, tmp_path / "peft", seed=81, lora_alpha=8), "damaged")
    owner.import_adapter(adapter, "whole")
    [name] = {n for n in server.stored() - stored if damaged["versions"][0]["digest"] in n}
    path = server.data_dir / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for options in ({}, {"stream": True}, {"n": 4}, {"n": 4, "stream": True}):
        refused(
            chat(owner, model=f"{owner.owner}/damaged", **options), 500, "block_damaged", "Import or train it again"
        )
    answer = plain(owner, model=f"{owner.owner}/damaged", prompt=["a", "b", "c"])
    refused(answer, 500, "block_damaged", "other adapters are not affected")
    assert owner.ask(f"{owner.owner}/whole")
    assert owner.http.delete(f"/v1/adapters/{damaged['id']}").is_success


def test_a_bug_is_a_500_with_a_request_id_that_the_log_has_too(
    base_directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def add_a_bug(app: FastAPI) -> None:
        @app.get("/v1/bug")
        def bug() -> None:
            raise ZeroDivisionError("secret detail")

    with running(small_config(base_directory, tmp_path), change=add_a_bug) as server:
        answer = server.user().http.get("/v1/bug")
        assert "secret" not in refused(answer, 500, "internal_error", "log")
    assert answer.headers["x-request-id"] in caplog.text


def test_a_full_budget_refuses_imports_and_jobs_and_keeps_what_was_there(
    base_directory: Path, base_model: PreTrainedModel, adapter: PeftFiles, tmp_path: Path
) -> None:
    with running(small_config(base_directory, tmp_path / "data", disk_bytes=60_000)) as server:
        user = server.user()
        user.import_adapter(adapter, "mine")
        said, stored = user.ask(f"{user.owner}/mine"), server.stored()
        other = PeftFiles(base_model, tmp_path / "other", seed=51)
        refused(imported(user, other), 507, "storage_full", "58.6 KiB", "--disk-bytes")
        job = user.job(user.train(chat_lines(), suffix="mine", max_steps=1), "failed")
        assert job.error is not None
        assert job.error.code == "storage_full"
        assert {name for name in server.stored() - stored if name.startswith("blobs")} == set()
        assert user.ask(f"{user.owner}/mine") == said
        assert len(user.http.get("/v1/adapters").json()["data"][0]["versions"]) == 1
