"""Hostile requests against a real server: each gets the error it should, and the server stays as it was."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import urlsplit

import pytest

from tests.hostile import Case, cases, named
from tests.serving import BASE, SECONDS, Server, User, chat_lines

CASES = named(cases())


@pytest.fixture(scope="module")
def attacker(server: Server) -> User:
    return server.user()


@pytest.fixture(scope="module")
def file(attacker: User) -> str:
    return attacker.upload(chat_lines())


@pytest.fixture(scope="module", autouse=True)
def nothing_has_changed(server: Server, attacker: User, file: str) -> Iterator[None]:
    victim = server.user()
    said, stored = victim.ask(BASE), server.stored()
    budgets = {
        name: tier["budget_bytes"] for name, tier in server.admin.http.get("/admin/tiers").json()["tiers"].items()
    }
    yield
    assert server.stored() == stored
    assert [f.id for f in attacker.openai.files.list()] == [file]
    assert attacker.openai.fine_tuning.jobs.list().data == []
    assert [m.id for m in attacker.openai.models.list()] == [BASE]
    after = server.admin.http.get("/admin/tiers").json()["tiers"]
    assert {name: tier["budget_bytes"] for name, tier in after.items()} == budgets
    assert victim.ask(BASE) == said
    server.hub.engine.check_integrity().result(SECONDS)


def test_there_are_many_of_them() -> None:
    assert len(CASES) >= 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of half a form's file, closed late
@pytest.mark.parametrize("name", CASES)
def test_a_hostile_request_gets_the_error_it_should(server: Server, attacker: User, file: str, name: str) -> None:
    case = CASES[name]
    status, body = answer(server, case.sent({"user": attacker.key, "admin": server.admin.key, "file": file}), case)
    assert status == case.status, body
    if status < 400 or case.method == "HEAD":
        return
    told = json.loads(body)
    assert told.keys() == {"error"}
    error = told["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] in ("invalid_request_error", "rate_limit_error")
    assert 10 < len(error["message"]) < 2000
    assert not case.code or error["code"] == case.code, error
    for leak in ("Traceback", "site-packages", ".py", str(server.data_dir), "sqlite3."):
        assert leak not in error["message"]


def answer(server: Server, sent: bytes, case: Case) -> tuple[int, bytes]:
    where = urlsplit(server.url)
    with socket.create_connection((where.hostname, where.port), timeout=SECONDS) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):  # an answer may come before all was sent
            connection.sendall(sent)
        response = http.client.HTTPResponse(connection, method=case.method)
        response.begin()
        return response.status, response.read()
