"""Files that are to be removed by themselves, through OpenAI's own SDK."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from adapterhub.errors import NotFound
from adapterhub.swap.database import Database
from adapterhub.train import files as train_files
from adapterhub.train.files import FileStore
from tests.serving import BASE, Server, User, chat_lines, eventually

HOUR: Any = {"anchor": "created_at", "seconds": 3600}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FileStore]:
    database = Database(tmp_path / "hub.db")
    yield FileStore(database, tmp_path / "uploads")
    database.close()


def test_a_file_is_gone_at_its_time_and_no_other_is(
    store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = store.upload("mira", "a", "user_data", [b"a"])
    late = store.upload("mira", "b", "user_data", [b"b"], seconds=7200)
    soon = store.upload("mira", "c", "user_data", [b"c"], seconds=3600)
    assert store.expire() == []
    monkeypatch.setattr(train_files, "now", lambda: soon.created_at + 3600)
    assert {file.id for file in store.page("mira", None, 10)[0]} == {kept.id, late.id}
    with pytest.raises(NotFound):
        store.get("mira", soon.id)
    assert [file.id for file in store.expire()] == [soon.id]
    assert {path.name for path in (tmp_path / "uploads").iterdir()} == {kept.id, late.id}


def end(server: Server, identity: str) -> None:
    """An hour goes by for it."""
    server.hub.database.update("files", identity, expires_at=1)


def test_what_has_expired_is_nowhere_and_leaves_room_and_a_count_of_its_storage(server: Server, user: User) -> None:
    file = user.openai.files.create(file=("a.jsonl", chat_lines()), purpose="fine-tune", expires_after=HOUR)
    assert file.expires_at == file.created_at + 3600
    assert user.openai.files.retrieve(file.id).expires_at == file.expires_at
    assert user.openai.files.retrieve(user.upload(b"x")).expires_at is None
    server.hub.database.update("files", file.id, created_at=file.created_at - 3600)  # it was there for an hour
    end(server, file.id)
    for gone in (user.openai.files.retrieve, user.openai.files.content, user.openai.files.delete):
        with pytest.raises(openai.NotFoundError):
            gone(file.id)
    with pytest.raises(openai.NotFoundError):
        user.openai.fine_tuning.jobs.create(model=BASE, training_file=file.id)
    assert file.id not in {listed.id for listed in user.openai.files.list()}
    eventually(lambda: not server.hub.files.path(file.id).exists())
    assert user.http.get("/v1/quotas").raise_for_status().json()["used"]["bytes"] == 1

    def counted() -> bool:
        rows = user.http.get("/v1/usage").raise_for_status().json()["data"]
        return sum(row["byte_hours"] for row in rows) > 0

    eventually(counted)


def test_a_file_made_of_parts_expires_by_its_own_time_and_not_its_uploads(server: Server, user: User) -> None:
    api = user.openai.uploads
    upload = api.create(bytes=3, filename="a", mime_type="text/plain", purpose="user_data", expires_after=HOUR)
    part = api.parts.create(upload.id, data=b"abc")
    server.hub.database.update("uploads", upload.id, created_at=upload.created_at - 1800)
    file = api.complete(upload.id, part_ids=[part.id]).file
    assert file is not None
    assert file.expires_at == file.created_at + 3600
    end(server, file.id)
    assert api.complete(upload.id, part_ids=[part.id]).file is None
