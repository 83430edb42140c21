"""Versions of adapters: what there is to know of one, and what a model's name means. Nothing here changes them."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate
from typing import Any, NamedTuple

from adapterhub.errors import BadRequest, NotFound
from adapterhub.swap.database import Database, Row
from adapterhub.swap.ref import AdapterRef

# the newest first: a row that is added has the highest rowid
_SELECT = """
    select v.id, v.number, v.kind, v.step, v.metrics, v.digest, v.nbytes, v.rank, v.fingerprint, v.base, v.origin,
           v.created_at, a.id as adapter, a.owner, a.name, a.current = v.id as current, a.pinned, a.split
    from versions v join adapters a on a.id = v.adapter
    where {where} order by a.owner, a.name, v.rowid desc
"""
PREVIOUS = """
    (select h.version from history h where h.adapter = a.id and h.version != a.current order by h.id desc limit 1)
"""  # of an adapter `a`: what was current before
_NUMBER = re.compile(r"[1-9][0-9]{0,10}")  # an id has twelve characters


class Kind(StrEnum):
    """What a version is to its adapter's name."""

    RELEASE = "release"  # the name points at it, or has pointed at it and can again
    CANDIDATE = "candidate"  # waits for somebody to promote it
    CHECKPOINT = "checkpoint"  # what a job had learned by a step


class Share(NamedTuple):
    """What a version gets of the requests for its adapter's name. The shares of a split sum to 100."""

    version: str
    percent: int


@dataclass(frozen=True)
class Version:
    """One immutable version, with the adapter it belongs to. `origin` is a job's id, or "import"."""

    id: str
    number: int | None  # counts an adapter's releases and candidates; a checkpoint gets one when it is promoted
    kind: Kind
    step: int | None  # of what is, or was promoted from, a checkpoint
    metrics: Mapping[str, Any] | None = field(hash=False)
    digest: str
    nbytes: int
    rank: int
    fingerprint: str
    base: str
    origin: str
    created_at: int
    adapter: str
    owner: str
    name: str
    current: bool
    pinned: str | None  # "owner" or "admin": who keeps the adapter in memory
    split: tuple[Share, ...]  # of the adapter's name; empty: the current version gets all

    @classmethod
    def of(cls, row: Row) -> Version:
        parsed = {
            "kind": Kind(row["kind"]),
            "metrics": row["metrics"] and json.loads(row["metrics"]),
            "current": bool(row["current"]),
            "split": tuple(Share(*share) for share in json.loads(row["split"])) if row["split"] else (),
        }
        return cls(**{**row, **parsed})

    @property
    def ref(self) -> AdapterRef:
        return AdapterRef(self.id, self.digest, self.nbytes, self.owner, self.current and self.pinned is not None)

    @property
    def model(self) -> str:
        """The name of this version in the API, for good: `ft:{base}:{owner}:{suffix}:{id}`, and of what was published
        as a checkpoint `ft:{base}:{owner}:{suffix}:{id}:ckpt-step-{step}`."""
        name = f"ft:{self.base}:{self.owner}:{self.name}:{self.id}"
        return name if self.step is None else f"{name}:ckpt-step-{self.step}"

    @property
    def alias(self) -> str:
        """The name of whatever version is current: `{owner}/{suffix}`."""
        return f"{self.owner}/{self.name}"

    @property
    def label(self) -> str:
        """What people call it among the versions of its adapter."""
        return f"version {self.number}" if self.number is not None else f"checkpoint {self.id} of step {self.step}"

    @property
    def percent(self) -> int:
        """What it gets of the requests for the adapter's name."""
        if not self.split:
            return 100 if self.current else 0
        return dict(self.split).get(self.id, 0)


class Versions:
    """Looks versions up. Safe to use from any thread."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def resolve(self, owner: str, model: str) -> Version | None:
        """The version that one of `owner`'s model names means; None if there is none of that name.

        That is a version's own name, `owner/name` for the current one, or `owner/name@which` as `find` takes it.
        """
        if model.startswith("ft:"):
            return self._which("a.owner = ?", (owner,), model)
        whose, _, rest = model.partition("/")
        if whose != owner:
            return None
        name, at, which = rest.partition("@")
        if at:
            return self._which("a.owner = ? and a.name = ?", (owner, name), which)
        return self._one("a.owner = ? and a.name = ? and v.id = a.current", (owner, name))

    def choose(self, current: Version, user: str | None = None) -> Version:
        """Which version answers a request for the name whose current one is given: with a split, one drawn by the
        shares, and always the same for a `user`. A share that grows keeps the users that it has."""
        if not current.split:
            return current
        if user is None:
            point = random.randrange(100)
        else:
            digest = hashlib.sha256(f"{current.adapter} {user}".encode()).digest()
            point = int.from_bytes(digest[:8]) % 100
        version = drawn(current.split, point)
        if version == current.id:
            return current
        return self._one("v.id = ?", (version,)) or current  # if it was deleted just now, the split has ended with it

    def current_beside(self, owner: str, version: str) -> Version | None:
        """The current version of the adapter that one of `owner`'s versions, by its id, is of; None without one."""
        return self._one(
            "a.owner = ? and a.id = (select adapter from versions where id = ?) and v.id = a.current", (owner, version)
        )

    def find(self, owner: str | None, adapter: str, which: str) -> Version:
        """A version of an adapter: by its number, its id or its name, or "candidate" for the newest of those, or
        "previous" for what was current before. Any owner's with `owner` None. Raises NotFound."""
        found = self._which("a.id = ? and (? is null or a.owner = ?)", (adapter, owner, owner), which)
        if found is None:
            alias = self.adapter(owner, adapter)[0].alias
            message = f"{alias} has no version {which[:200]!r}. `adapterhub adapters versions {alias}` lists them."
            raise NotFound(message, param="version")
        return found

    def version(self, owner: str, version: str) -> Version:
        """By its id. Raises NotFound."""
        found = self._one("a.owner = ? and v.id = ?", (owner, version))
        if found is None:
            raise NotFound(f"There is no version {version!r}.")
        return found

    def adapter(self, owner: str | None, adapter: str) -> list[Version]:
        """All versions of an adapter, by its id, the newest first; any owner's with `owner` None. Raises NotFound."""
        found = self._all("a.id = ? and (? is null or a.owner = ?)", (adapter, owner, owner))
        if not found:
            whose, route = ("There is", "/admin/adapters") if owner is None else ("You have", "/v1/adapters")
            raise NotFound(f"{whose} no adapter {adapter[:80]!r}. `GET {route}` lists them.", param="id")
        return found

    def named(self, owner: str, name: str) -> list[Version]:
        """All versions of `owner`'s adapter of that name, the newest first."""
        return self._all("a.owner = ? and a.name = ?", (owner, name))

    def versions(self, owner: str | None = None) -> list[Version]:
        """Every version of `owner`'s, or of all owners', by adapter, the newest first."""
        return self._all("true", ()) if owner is None else self._all("a.owner = ?", (owner,))

    def adapters(self, adapters: Sequence[str]) -> list[Version]:
        """Every version of the adapters with those ids, by adapter, the newest first."""
        return self._all("a.id in (select value from json_each(?))", (json.dumps(adapters),))

    def of_blocks(self, digests: Iterable[str]) -> list[Version]:
        """Every version, of whatever owner, that has one of those blocks."""
        return self._all("v.digest in (select value from json_each(?))", (json.dumps(list(digests)),))

    def of_origin(self, owner: str, origin: str) -> Version | None:
        """The release or candidate that a job has ended with, if it has published it."""
        return self._one("a.owner = ? and v.origin = ? and v.step is null", (owner, origin))

    def checkpoints(self, owner: str, job: str) -> list[Version]:
        """Those of a job, the last step first, with those that have been promoted."""
        found = self._all("a.owner = ? and v.origin = ? and v.step is not null", (owner, job))
        return sorted(found, key=lambda version: version.step or 0, reverse=True)

    def _which(self, of: str, args: tuple[object, ...], which: str) -> Version | None:
        """Of the versions for which the condition `of` holds."""
        if which == "candidate":
            return self._one(f"{of} and v.kind = ?", (*args, Kind.CANDIDATE))
        if which == "previous":
            return self._one(f"{of} and v.id = {PREVIOUS}", args)
        if _NUMBER.fullmatch(which):
            return self._one(f"{of} and v.number = ?", (*args, int(which)))
        *_, before, last = ("", *which.split(":"))
        found = self._one(f"{of} and v.id = ?", (*args, before if last.startswith("ckpt-step-") else last))
        return found if found and which in (found.id, found.model) else None

    def _one(self, where: str, args: tuple[object, ...]) -> Version | None:
        found = self._all(where, args)
        return found[0] if found else None

    def _all(self, where: str, args: tuple[object, ...]) -> list[Version]:
        return [Version.of(row) for row in self._database.rows(_SELECT.format(where=where), args)]


def drawn(split: Sequence[Share], point: int) -> str:
    """The version whose share a `point`, from 0 to 99, lies in."""
    ends = accumulate(share.percent for share in split)
    return next(share.version for share, end in zip(split, ends, strict=True) if point < end)


def current_of(versions: Sequence[Version]) -> Version:
    """The current one of an adapter's versions. Raises BadRequest when none has been released yet."""
    found = next((version for version in versions if version.current), None)
    if found is None:
        raise BadRequest(no_release(versions), param="id", code="no_release")
    return found


def no_release(versions: Sequence[Version]) -> str:
    """What to say of an adapter whose name points at none of its versions."""
    alias = versions[0].alias
    counts = Counter(version.kind for version in versions)
    only = " and ".join(f"{n} {kind}{'' if n == 1 else 's'}" for kind, n in counts.items())
    return (
        f"{alias} has no release yet, only {only}. Ask for {versions[0].model}, or have `{alias}` point at one: "
        f"`adapterhub adapters promote {alias} {versions[0].number or versions[0].id}`."
    )
