"""All that is kept of an owner, as one zip.

- `account.json`: keys, without their secrets, and quotas;
- `files.json`, and `files/` with each file under its id and name;
- `uploads.json`, and `uploads/<id>/` with the parts of each upload that has not been completed;
- `jobs/<id>/`: a job, and its events, the newest first;
- `adapters.json`, and `adapters/<name>/<version>/`, each a PEFT directory;
- `usage.csv`: by day, project, key and adapter;
- `missing.json`: what could not be read, and why; usually nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, TypeVar

from adapterhub.api.archive import stream_zip
from adapterhub.api.files import file_object
from adapterhub.api.hub import Hub
from adapterhub.api.jobs import event_object, job_object
from adapterhub.api.keys import key_object
from adapterhub.api.listing import adapter_objects
from adapterhub.api.tenancy.terms import Group
from adapterhub.api.tenancy.usage import Asked
from adapterhub.api.uploads import upload_object
from adapterhub.api.usage import usage_csv
from adapterhub.config import MIB
from adapterhub.errors import HubError
from adapterhub.swap import peft
from adapterhub.swap.versions import Version
from adapterhub.train.events import Event
from adapterhub.train.files import StoredFile
from adapterhub.train.job import Job

_PAGE = 1000
_NAME_LETTERS = 50  # of a file's name
_BY = (Group.DAY, Group.PROJECT, Group.KEY, Group.ADAPTER)
Listed = TypeVar("Listed", StoredFile, Job, Event)
Files = Iterator[tuple[str, Iterable[bytes]]]


def export(hub: Hub, owner: str) -> Iterator[bytes]:
    """The zip, piece by piece. What is deleted meanwhile is not in it, or among what is missing."""
    return stream_zip(_Export(hub, owner).files())


class _Export:
    def __init__(self, hub: Hub, owner: str) -> None:
        self._hub, self._owner = hub, owner
        self._missing: dict[str, str] = {}

    def files(self) -> Files:
        yield "account.json", _json(self._account())
        yield from self._stored_files()
        yield from self._uploads()
        yield from self._jobs()
        yield from self._adapters()
        self._hub.meter.save()
        asked = Asked(date.min, datetime.now(UTC).date(), self._owner, _BY)
        yield "usage.csv", (part.encode() for part in usage_csv(self._hub, asked))
        yield "missing.json", _json(self._missing)

    def _account(self) -> dict[str, Any]:
        keys = [key_object(key) for key in self._hub.keys.list(self._owner)]
        return {"owner": self._owner, "keys": keys, "quotas": self._hub.quotas.given().get(self._owner, {})}

    def _stored_files(self) -> Files:
        stored = list(_all(lambda after: self._hub.files.page(self._owner, after, _PAGE)))
        yield "files.json", _json([file_object(file) for file in stored])
        for file in stored:
            name = file.filename[-_NAME_LETTERS:]  # its end says what it is
            yield f"files/{file.id}-{name}", self._content(file.id, self._hub.files.path(file.id))

    def _uploads(self) -> Files:
        pending = self._hub.uploads.pending(self._owner)
        yield "uploads.json", _json([upload_object(self._hub, upload) for upload, _ in pending])
        for upload, parts in pending:
            for part, path in parts.items():
                yield f"uploads/{upload.id}/{part}", self._content(part, path)

    def _content(self, what: str, path: Path) -> Iterator[bytes]:
        try:
            with path.open("rb") as file:
                while chunk := file.read(MIB):
                    yield chunk
        except OSError as error:
            self._missing[what] = str(error.strerror)

    def _jobs(self) -> Files:
        for job in _all(lambda after: self._hub.jobs.page(self._owner, after, _PAGE, metadata={})):
            yield f"jobs/{job.id}/job.json", _json(job_object(job))
            yield f"jobs/{job.id}/events.jsonl", self._events(job.id)

    def _events(self, job: str) -> Iterator[bytes]:
        for event in _all(lambda after: self._hub.jobs.events.page(job, after, _PAGE)):
            yield json.dumps(event_object(event)).encode() + b"\n"

    def _adapters(self) -> Files:
        adapters: dict[str, list[Version]] = {}
        for version in self._hub.registry.versions(self._owner):
            adapters.setdefault(version.adapter, []).append(version)
        yield "adapters.json", _json(adapter_objects(self._hub, list(adapters.values())))
        for versions in adapters.values():
            for version in versions:
                try:
                    files = peft.export_files(self._hub.registry.block(version))
                except HubError as error:
                    self._missing[version.model] = error.message
                    continue
                for name, content in files.items():
                    yield f"adapters/{version.name}/{version.id}/{name}", [content]


def _all(page: Callable[[str | None], tuple[Sequence[Listed], bool]]) -> Iterator[Listed]:
    """The items of all pages; `page` gives the one after an id, and whether there are more."""
    after, more = None, True
    while more:
        items, more = page(after)
        yield from items
        after = items[-1].id if items else None


def _json(value: Any) -> list[bytes]:
    return [json.dumps(value, indent=2).encode()]
