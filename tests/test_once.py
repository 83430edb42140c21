"""`Idempotency-Key`: what is asked for twice with one is made once, for its owner, and no other request gets it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapterhub.api.tenancy import once as tenancy_once
from adapterhub.api.tenancy.once import Asked, Once
from adapterhub.errors import KeyReused, NotFound
from adapterhub.swap.database import Database
from tests.serving import BASE, PeftFiles, Server, User, chat_lines

Ask = Callable[[User, str, str], httpx.Response]


def _post_file(user: User, key: str, what: str) -> httpx.Response:
    files = {"file": ("data.jsonl", what.encode())}
    return user.http.post("/v1/files", data={"purpose": "user_data"}, files=files, headers={"Idempotency-Key": key})


def _post_upload(user: User, key: str, what: str) -> httpx.Response:
    body = {"bytes": len(what), "filename": "a", "mime_type": "text/plain", "purpose": "user_data"}
    return user.http.post("/v1/uploads", json=body, headers={"Idempotency-Key": key})


def _post_job(user: User, key: str, what: str) -> httpx.Response:
    files = user.openai.files.list().data
    file = files[0].id if files else user.upload(chat_lines())
    return user.http.post(
        "/v1/fine_tuning/jobs",
        json={"model": BASE, "training_file": file, "suffix": what, "hyperparameters": {"max_steps": 1}},
        headers={"Idempotency-Key": key},
    )


ASKED: list[Ask] = [_post_file, _post_upload, _post_job]


@pytest.mark.parametrize("ask", ASKED)
def test_a_key_makes_one_thing_for_its_owner_and_none_for_another_request(server: Server, user: User, ask: Ask) -> None:
    first = ask(user, "k-1", "a").raise_for_status().json()["id"]
    assert ask(user, "k-1", "a").raise_for_status().json()["id"] == first
    refused = ask(user, "k-1", "another")
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "idempotency_key_reused"
    assert ask(user, "k-2", "a").raise_for_status().json()["id"] != first
    assert ask(server.user(), "k-1", "a").raise_for_status().json()["id"] != first


@pytest.mark.parametrize("key", ["", "k" * 256])
def test_a_key_of_no_or_too_many_characters_is_refused(user: User, key: str) -> None:
    assert [ask(user, key, "a").status_code for ask in ASKED] == [400] * 3


def test_an_import_with_a_key_makes_one_version(user: User, adapter: PeftFiles, other_adapter: PeftFiles) -> None:
    def post(files: PeftFiles) -> httpx.Response:
        headers = {"Idempotency-Key": "k"}
        return user.http.post("/v1/adapters", data={"name": "mine"}, files=files.upload, headers=headers)

    first = post(adapter).raise_for_status().json()
    again = post(adapter).raise_for_status().json()
    assert [version["id"] for version in again["versions"]] == [version["id"] for version in first["versions"]]
    assert again["warnings"] == first["warnings"]
    assert post(other_adapter).status_code == 400


def test_what_was_deleted_is_made_again(user: User) -> None:
    first = _post_file(user, "k", "a").raise_for_status().json()["id"]
    user.openai.files.delete(first)
    second = _post_file(user, "k", "a").raise_for_status().json()["id"]
    assert second != first
    assert _post_file(user, "k", "a").raise_for_status().json()["id"] == second


def test_requests_that_come_at_once_make_one(user: User) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: _post_file(user, "k", "a").raise_for_status().json()["id"], range(8)))
    assert len(set(answers)) == 1
    assert len(user.openai.files.list().data) == 1


def test_an_erased_owners_keys_are_forgotten(server: Server) -> None:
    user = server.user()
    _post_file(user, "k", "a").raise_for_status()
    assert server.hub.database.rows("select 1 from once where owner = ?", (user.owner,))
    server.admin.http.delete(f"/admin/users/{user.owner}").raise_for_status()
    assert server.hub.database.rows("select 1 from once where owner = ?", (user.owner,)) == []


# -- the store


class Thing:
    def __init__(self, identity: str) -> None:
        self.id = identity


@pytest.fixture
def once(tmp_path: Path) -> Iterator[Once]:
    database = Database(tmp_path / "hub.db")
    yield Once(database)
    database.close()


def test_a_key_is_known_for_a_day(once: Once, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def make() -> Thing:
        made.append(f"thing-{len(made)}")
        return Thing(made[-1])

    def ask(digest: str = "d") -> str:
        return once.made(Asked("mira", "thing", "k"), lambda: digest, Thing, make).id

    assert [ask(), ask()] == ["thing-0", "thing-0"]
    with pytest.raises(KeyReused):
        ask("other")
    began = tenancy_once.now()
    monkeypatch.setattr(tenancy_once, "now", lambda: began + 86401)
    once.expire()
    assert ask("other") == "thing-1"


def test_what_cannot_be_made_is_tried_again(once: Once) -> None:
    def fail() -> Any:
        raise NotFound("There is nothing to make it of.")

    asked = Asked("mira", "thing", "k")
    with pytest.raises(NotFound):
        once.made(asked, lambda: "d", Thing, fail)
    assert once.made(asked, lambda: "d", Thing, lambda: Thing("thing-1")).id == "thing-1"
