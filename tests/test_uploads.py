"""Uploads in parts: by OpenAI's SDK, in any order, too many, too late, killed; and what another owner sees of them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from adapterhub.api.hub import Hub
from adapterhub.config import MIB
from adapterhub.errors import BadRequest, NotFound, QuotaExceeded
from adapterhub.swap.database import Database
from adapterhub.train import uploads as train_uploads
from adapterhub.train.files import FileStore
from adapterhub.train.uploads import Status, UploadStore
from tests.serving import MAX_FILE, Server, User, chat_lines

CONTENT = random.Random(1).randbytes(3 * MIB + 17)


class Stores:
    """What a server opens, again after each kill."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.open()

    def open(self) -> None:
        self.database = Database(self.directory / "hub.db")
        self.files = FileStore(self.database, self.directory / "uploads")
        self.uploads = UploadStore(self.database, self.files, self.directory / "parts")

    def restart(self) -> None:
        self.database.close()
        self.open()
        self.files.clean_up()
        self.uploads.clean_up()

    def begin(self, owner: str = "mira", nbytes: int = 6) -> str:
        return self.uploads.create(owner, "data.jsonl", "fine-tune", nbytes).id

    def part(self, upload: str, content: bytes, owner: str = "mira") -> str:
        return self.uploads.add_part(owner, upload, [content]).id

    def on_disk(self) -> list[bytes]:
        return sorted(path.read_bytes() for name in ("uploads", "parts") for path in (self.directory / name).iterdir())


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[Stores]:
    opened = Stores(tmp_path)
    yield opened
    opened.database.close()


def parts_on_disk(hub: Hub) -> set[Path]:
    return set(hub.config.parts_dir.iterdir())


# -- through the SDK


def test_the_sdk_uploads_a_file_in_parts_which_is_then_as_any_other(server: Server, user: User) -> None:
    before = parts_on_disk(server.hub)  # of other tests' uploads, which are pending
    upload = user.openai.uploads.upload_file_chunked(
        file=CONTENT,
        filename="train.jsonl",
        bytes=len(CONTENT),
        mime_type="text/jsonl",
        purpose="fine-tune",
        part_size=MIB,
        md5=hashlib.md5(CONTENT).hexdigest(),
    )
    assert (upload.status, upload.bytes, upload.object) == ("completed", len(CONTENT), "upload")
    assert upload.expires_at - upload.created_at == 3600
    assert upload.file is not None
    assert (upload.file.filename, upload.file.bytes, upload.file.purpose) == ("train.jsonl", len(CONTENT), "fine-tune")
    assert user.openai.files.content(upload.file.id).content == CONTENT
    assert [file.id for file in user.openai.files.list()] == [upload.file.id]
    assert parts_on_disk(server.hub) == before


def test_a_job_trains_on_a_file_that_came_in_parts_larger_than_other_bodies_may_be(user: User) -> None:
    lines = chat_lines()
    upload = user.openai.uploads.upload_file_chunked(
        file=lines, filename="a.jsonl", bytes=len(lines), mime_type="text/jsonl", purpose="fine-tune", part_size=100
    )
    assert upload.file is not None
    job = user.openai.fine_tuning.jobs.create(
        model="tiny",
        training_file=upload.file.id,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
    )
    user.job(job.id, "succeeded")


def test_parts_are_joined_in_the_order_given_at_the_end(user: User) -> None:
    api = user.openai.uploads
    upload = api.create(bytes=6, filename="a", mime_type="text/plain", purpose="user_data")
    late, dropped, early = (api.parts.create(upload.id, data=data).id for data in (b"def", b"xyz", b"abc"))
    done = api.complete(upload.id, part_ids=[early, late])
    assert done.file is not None
    assert user.openai.files.content(done.file.id).content == b"abcdef"
    assert api.complete(upload.id, part_ids=[early, late]) == done, "an SDK may try again"
    with pytest.raises(openai.BadRequestError, match="already completed"):
        api.parts.create(upload.id, data=dropped.encode())
    with pytest.raises(openai.BadRequestError, match="already completed"):
        api.cancel(upload.id)


def test_a_cancelled_upload_leaves_nothing(server: Server, user: User) -> None:
    api, before = user.openai.uploads, parts_on_disk(server.hub)
    upload = api.create(bytes=3, filename="a", mime_type="text/plain", purpose="user_data")
    part = api.parts.create(upload.id, data=b"abc")
    assert parts_on_disk(server.hub) > before
    assert api.cancel(upload.id).status == api.cancel(upload.id).status == "cancelled"
    assert parts_on_disk(server.hub) == before
    with pytest.raises(openai.BadRequestError, match="already cancelled"):
        api.complete(upload.id, part_ids=[part.id])


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"bytes": 0}, 400, "bytes"),
        ({"bytes": MAX_FILE + 1}, 413, "bytes"),
        ({"bytes": "7"}, 400, "bytes"),
        ({"purpose": "none"}, 400, "purpose"),
        ({"expires_after": {"anchor": "created_at", "seconds": 60}}, 400, "expires_after.seconds"),
        ({"expires_after": {"seconds": 3600}}, 400, "expires_after.anchor"),
        ({"filename": None}, 400, "filename"),
    ],
)
def test_what_cannot_be_uploaded_is_refused_when_it_begins(
    user: User, changes: dict[str, Any], status: int, param: str
) -> None:
    body = {"bytes": 3, "filename": "a", "mime_type": "text/plain", "purpose": "user_data", **changes}
    answer = user.http.post("/v1/uploads", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_what_does_not_make_the_file_that_was_announced_is_refused_and_can_be_mended(user: User) -> None:
    api = user.openai.uploads
    upload = api.create(bytes=6, filename="a", mime_type="text/plain", purpose="user_data")
    first, second = (api.parts.create(upload.id, data=data).id for data in (b"abc", b"def"))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"part_ids": [first]}, "have 3 bytes"),
        ({"part_ids": [first, first]}, "named twice"),
        ({"part_ids": [first, "part-none"]}, "no part 'part-none'"),
        ({"part_ids": [first, second], "md5": hashlib.md5(b"defabc").hexdigest()}, "MD5"),
    ]
    for fields, reason in wrong:
        with pytest.raises(openai.BadRequestError, match=reason):
            api.complete(upload.id, **fields)
    assert api.complete(upload.id, part_ids=[second, first], md5=hashlib.md5(b"defabc").hexdigest()).file is not None


def test_another_owners_upload_and_part_answer_as_unknown_ones(server: Server, user: User) -> None:
    theirs, api = server.user(), user.openai.uploads
    upload = theirs.openai.uploads.create(bytes=3, filename="a", mime_type="text/plain", purpose="user_data")
    part = theirs.openai.uploads.parts.create(upload.id, data=b"abc").id
    own = api.create(bytes=3, filename="a", mime_type="text/plain", purpose="user_data").id
    said = []
    for identity in (upload.id, "upload-none"):
        calls: list[Any] = [
            lambda i: api.parts.create(i, data=b"abc"),
            api.cancel,
            lambda i: api.complete(i, part_ids=[part]),
        ]
        for call in calls:
            with pytest.raises(openai.NotFoundError) as raised:
                call(identity)
            said.append(raised.value.message.replace(identity, ""))
    assert said[:3] == said[3:]
    with pytest.raises(openai.BadRequestError, match="no part"):
        api.complete(own, part_ids=[part])


# -- limits and time


def test_pending_uploads_are_counted_and_expire(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(train_uploads.MAX_PENDING):
        upload = stores.begin()
    part = stores.part(upload, b"abcdef")
    with pytest.raises(QuotaExceeded, match="32 uploads pending"):
        stores.begin()
    stores.begin("ola")
    began = train_uploads.now()
    monkeypatch.setattr(train_uploads, "now", lambda: began + 3601)
    for late in (lambda: stores.part(upload, b"abc"), lambda: stores.uploads.complete("mira", upload, [part], None)):
        with pytest.raises(BadRequest, match="expired"):
            late()
    stores.begin()
    stores.uploads.expire()
    assert stores.on_disk() == []
    assert stores.uploads.get("mira", upload).status is Status.EXPIRED
    monkeypatch.setattr(train_uploads, "now", lambda: began + 2 * 86400)
    stores.uploads.expire()
    with pytest.raises(NotFound):
        stores.uploads.get("mira", upload)


def test_parts_beyond_what_was_announced_are_refused_and_leave_nothing(stores: Stores) -> None:
    upload = stores.begin()
    for content in (b"abcdef", b"abcdef"):
        stores.part(upload, content)
    with pytest.raises(BadRequest, match="would have 13"):
        stores.part(upload, b"x")
    with pytest.raises(BadRequest, match="empty"):
        stores.part(upload, b"")
    assert stores.on_disk() == [b"abcdef", b"abcdef"]


def test_what_is_pending_counts_against_the_bytes_that_an_owner_may_keep(server: Server) -> None:
    user = server.user()
    server.hub.quotas.change(user.owner, {"bytes": 1000})
    fields: Any = {"filename": "a", "mime_type": "text/plain", "purpose": "user_data"}
    first = user.openai.uploads.create(bytes=600, **fields)
    with pytest.raises(openai.RateLimitError, match="may keep"):
        user.openai.uploads.create(bytes=600, **fields)
    user.openai.uploads.cancel(first.id)
    user.openai.uploads.create(bytes=600, **fields)


# -- kills


class Killed(BaseException):
    """The process is gone: nothing after this runs."""


def test_killed_before_the_file_has_its_row_the_upload_can_be_completed_again(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = stores.begin()
    parts = [stores.part(upload, b"abc"), stores.part(upload, b"def")]

    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(stores.files, "add", killed)
        patch.setattr(stores.files, "discard", lambda _: None)
        with pytest.raises(Killed):
            stores.uploads.complete("mira", upload, parts, None)
    assert stores.on_disk() == [b"abc", b"abcdef", b"def"]
    stores.restart()
    assert stores.on_disk() == [b"abc", b"def"]
    assert stores.uploads.complete("mira", upload, parts, None).status is Status.COMPLETED
    assert stores.on_disk() == [b"abcdef"]


def test_killed_after_the_file_has_its_row_it_is_there_and_the_parts_go(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = stores.begin()
    part = stores.part(upload, b"abcdef")
    with monkeypatch.context() as patch:
        patch.setattr(stores.uploads, "_remove", lambda _: None)
        stores.uploads.complete("mira", upload, [part], None)
    assert stores.on_disk() == [b"abcdef", b"abcdef"]
    stores.restart()
    assert stores.on_disk() == [b"abcdef"]
    [file], _ = stores.files.page("mira", None, 10)
    assert stores.uploads.complete("mira", upload, [part], None).file == file.id


def test_a_part_that_was_cut_off_is_none(stores: Stores) -> None:
    upload = stores.begin()

    def cut_off() -> Iterator[bytes]:
        yield b"abc"
        raise ConnectionError

    with pytest.raises(ConnectionError):
        stores.uploads.add_part("mira", upload, cut_off())
    (stores.directory / "parts" / "part-x.0.partial").write_bytes(b"abc")  # as a kill leaves it
    (stores.directory / "parts" / "part-y").write_bytes(b"abc")
    stores.restart()
    assert stores.on_disk() == []


def test_erasing_removes_an_owners_uploads_and_no_others(stores: Stores) -> None:
    stores.part(stores.begin(), b"abc")
    stores.part(stores.begin("ola"), b"def", "ola")
    assert stores.uploads.erase("mira") == 1
    assert stores.uploads.erase("mira") == 0
    assert stores.on_disk() == [b"def"]
