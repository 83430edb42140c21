"""Two owners do whatever the API lets them, in any order: neither ever sees or changes what is the other's."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from adapterhub.api.reference import application, endpoints
from adapterhub.errors import NotFound
from adapterhub.train.files import FileStore, StoredFile
from tests.serving import BASE, PeftFiles, Server, User, chat_lines
from tests.test_bad_input import CHAT, HELLO, JOBS

NAMES = st.sampled_from(["mine", "yours"])  # both owners use the same names
WHO = st.sampled_from([0, 1])
LINES = chat_lines()
HALVES = (LINES[:200], LINES[200:])  # the parts of an upload
EXAMPLES, STEPS = 8, 25


@dataclass
class Account:
    """An owner, and what they should have, as far as they were told."""

    user: User
    files: set[str] = field(default_factory=set)
    jobs: set[str] = field(default_factory=set)
    adapters: dict[str, str] = field(default_factory=dict)  # ids by name
    versions: dict[str, int] = field(default_factory=dict)  # how many, by name
    results: set[str] = field(default_factory=set)  # files of jobs that succeeded
    uploads: dict[str, list[str]] = field(default_factory=dict)  # the parts of those that are pending

    @property
    def parts(self) -> set[str]:
        return {part for parts in self.uploads.values() for part in parts}

    @property
    def ids(self) -> set[str]:
        return self.files | self.results | self.jobs | set(self.adapters.values()) | set(self.uploads) | self.parts

    def begin_upload(self) -> str:
        began = self.user.openai.uploads.create(
            bytes=len(HALVES[0] + HALVES[1]), filename="a", mime_type="text/jsonl", purpose="fine-tune"
        )
        self.uploads[began.id] = []
        return began.id


class TwoOwners(RuleBasedStateMachine):
    server: Server
    adapters: list[PeftFiles]

    @initialize()
    def arrive(self) -> None:
        """With a file that came in parts, and another that is still coming."""
        self.accounts = [Account(self.server.user()) for _ in range(2)]
        for who in range(2):
            for whole in (True, False):
                self.upload_in_parts(who, whole)
        self.try_the_others(0, "mine")  # a step of its own is not in every run

    # -- each with their own

    @rule(who=WHO)
    def upload(self, who: int) -> None:
        account = self.accounts[who]
        account.files.add(account.user.upload(chat_lines()))

    @rule(who=WHO, data=st.data())
    def delete_a_file(self, who: int, data: st.DataObject) -> None:
        account = self.accounts[who]
        if account.files:
            file = data.draw(st.sampled_from(sorted(account.files)))
            account.user.openai.files.delete(file)
            account.files.remove(file)

    @rule(who=WHO, name=NAMES, which=st.sampled_from([0, 1]))
    def import_one(self, who: int, name: str, which: int) -> None:
        account = self.accounts[who]
        account.adapters[name] = account.user.import_adapter(self.adapters[which], name)["id"]
        account.versions[name] = account.versions.get(name, 0) + 1

    @rule(who=WHO, name=NAMES)
    def delete_an_adapter(self, who: int, name: str) -> None:
        account = self.accounts[who]
        if name in account.adapters:
            account.user.http.delete(f"/v1/adapters/{account.adapters.pop(name)}").raise_for_status()
            del account.versions[name]

    @rule(who=WHO)
    def train_and_cancel(self, who: int) -> None:
        account = self.accounts[who]
        file = account.user.upload(chat_lines(5))  # too few examples: it never makes a version
        job = account.user.openai.fine_tuning.jobs.create(model=BASE, training_file=file).id
        account.user.http.post(f"{JOBS}/{job}/cancel")
        account.files.add(file)
        account.jobs.add(job)

    @rule(who=WHO, otherwise=st.integers(0, 3))
    def train_now_and_then(self, who: int, otherwise: int) -> None:
        """To the end: with a version, a checkpoint and a file of results."""
        account = self.accounts[who]
        if otherwise or "trained" in account.adapters:
            return
        file = account.user.upload(LINES)
        method: Any = {"type": "supervised", "supervised": {"hyperparameters": {"max_steps": 2}}}
        made = account.user.openai.fine_tuning.jobs.create(
            model=BASE, training_file=file, suffix="trained", seed=7, method=method
        )
        job = account.user.job(made.id, "succeeded")
        [adapter] = [a for a in account.user.http.get("/v1/adapters").json()["data"] if a["name"] == "trained"]
        account.files.add(file)
        account.jobs.add(job.id)
        account.results.update(job.result_files)
        account.adapters["trained"], account.versions["trained"] = adapter["id"], len(adapter["versions"])

    @rule(who=WHO, name=NAMES, data=st.data())
    def steer(self, who: int, name: str, data: st.DataObject) -> None:
        """What the name means, and whether it stays in memory."""
        account = self.accounts[who]
        if name not in account.adapters:
            return
        path, versions = f"/v1/adapters/{account.adapters[name]}", account.versions[name]
        number = data.draw(st.integers(1, versions))
        shown = account.user.http.post(f"{path}/versions/{number}/promote").raise_for_status().json()
        assert [v["number"] for v in shown["versions"] if v["current"]] == [number]
        if versions > 1:
            other = number % versions + 1
            account.user.http.post(f"{path}/versions/{other}/promote").raise_for_status()
            shown = account.user.http.post(f"{path}/rollback").raise_for_status().json()
            assert [v["number"] for v in shown["versions"] if v["current"]] == [number]
            split = account.user.http.put(f"{path}/split", json={"percent": {str(other): 10}}).raise_for_status().json()
            assert sorted(split["split"].values()) == [10, 90]
            assert account.user.http.delete(f"{path}/split").raise_for_status().json()["split"] is None
        for verb, pinned in (("pin", "owner"), ("unpin", None)):
            assert account.user.http.post(f"{path}/{verb}").raise_for_status().json()["pinned"] == pinned

    @rule(who=WHO, name=NAMES)
    def ask(self, who: int, name: str) -> None:
        account = self.accounts[who]
        body = {"model": f"{account.user.owner}/{name}", "messages": HELLO, "max_tokens": 1}
        status = account.user.http.post(CHAT, json=body).status_code
        assert status == (200 if name in account.adapters else 404)

    @rule(who=WHO, whole=st.booleans())
    def upload_in_parts(self, who: int, whole: bool) -> None:
        """All of it, or a part for now."""
        account = self.accounts[who]
        upload = account.begin_upload()
        account.uploads[upload].append(account.user.openai.uploads.parts.create(upload, data=HALVES[0]).id)
        if whole:
            self._complete(account, upload)

    @rule(who=WHO, data=st.data())
    def complete_an_upload(self, who: int, data: st.DataObject) -> None:
        account = self.accounts[who]
        if account.uploads:
            self._complete(account, data.draw(st.sampled_from(sorted(account.uploads))))

    def _complete(self, account: Account, upload: str) -> None:
        """With those of its parts that are not there yet."""
        parts, client = account.uploads[upload], account.user.openai
        parts += [client.uploads.parts.create(upload, data=half).id for half in HALVES[len(parts) :]]
        done = client.uploads.complete(upload, part_ids=parts)
        assert done.file is not None
        assert client.files.content(done.file.id).read() == LINES
        account.files.add(done.file.id)
        del account.uploads[upload]

    @rule(who=WHO, data=st.data())
    def cancel_an_upload(self, who: int, data: st.DataObject) -> None:
        account = self.accounts[who]
        if account.uploads:
            upload = data.draw(st.sampled_from(sorted(account.uploads)))
            assert account.user.openai.uploads.cancel(upload).status == "cancelled"
            del account.uploads[upload]

    @rule(who=WHO, by_operator=st.booleans())
    def export(self, who: int, by_operator: bool) -> None:
        """All that is the owner's, and no word of the other."""
        account, other = self.accounts[who], self.accounts[1 - who]
        http = self.server.admin.http if by_operator else account.user.http
        path = f"/admin/users/{account.user.owner}/export" if by_operator else "/v1/export"
        archive = zipfile.ZipFile(io.BytesIO(http.get(path).raise_for_status().content))
        held = {name: archive.read(name) for name in archive.namelist()}
        assert json.loads(held["missing.json"]) == {}
        assert {file["id"] for file in json.loads(held["files.json"])} == account.files | account.results
        assert {name.split("/")[1] for name in held if name.startswith("jobs/")} == account.jobs
        found = {adapter["name"]: adapter for adapter in json.loads(held["adapters.json"])}
        assert {name: adapter["id"] for name, adapter in found.items()} == account.adapters
        weights = [name for name in held if name.endswith("/adapter_model.safetensors")]
        assert len(weights) == sum(account.versions.values())
        for name, content in {name: content for name, content in held.items() if name not in weights}.items():
            for strange in (f"{other.user.owner}/", f'"{other.user.owner}"', *other.ids):
                assert strange.encode() not in name.encode() + content, name

    @rule(who=WHO, otherwise=st.integers(0, 3))
    def erase_now_and_then(self, who: int, otherwise: int) -> None:
        if not otherwise:
            self._erase(who)

    def _erase(self, who: int) -> None:
        """The owner comes back with nothing but their name."""
        account = self.accounts[who]
        owner, before = account.user.owner, account.user
        receipt = self.server.admin.http.delete(f"/admin/users/{owner}").raise_for_status().json()
        removed = receipt["removed"]
        assert receipt["status"] == "completed"
        assert (removed["jobs"], removed["adapters"]) == (len(account.jobs), len(account.adapters))
        assert removed["files"] == len(account.files | account.results)
        assert removed["versions"] == sum(account.versions.values())
        assert before.http.get("/v1/files").status_code == 401
        self.accounts[who] = Account(self.server.user(owner=owner))

    # -- at the other's door

    @rule(who=WHO, name=NAMES)
    def try_the_others(self, who: int, name: str) -> None:
        """Whatever is asked of the other's things has the answer that things which are not there would have."""
        for verb in VERBS:
            self._try(verb, who, name)

    def _try(self, verb: str, who: int, name: str) -> None:
        me, other = self.accounts[who], self.accounts[1 - who]
        what, method, path, body = VERBS[verb]
        if not (theirs := what(other, name)):
            return
        if "MINE" in path:
            path = path.replace("MINE", me.begin_upload())
        told = []
        for identity in (theirs, "x" * len(theirs)):
            options: dict[str, Any] = {}
            if path.endswith("/parts"):
                options = {"files": {"data": ("a", b"text")}}
            elif body is not None:
                options = {"json": json.loads(json.dumps(body).replace('"ID"', json.dumps(identity)))}
            answer = me.user.http.request(method, path.replace("ID", identity.replace("/", "%2F")), **options)
            assert answer.status_code in (400, 403, 404), (verb, answer.text)
            told.append(answer.text.replace(identity, "ID"))
        assert told[0] == told[1], verb

    # -- and always

    @invariant()
    def each_sees_their_own_and_no_more(self) -> None:
        for account in getattr(self, "accounts", []):
            http = account.user.http

            def listed(path: str, http: Any = http) -> list[dict[str, Any]]:
                return http.get(path).raise_for_status().json()["data"]

            assert {f["id"] for f in listed("/v1/files") if f["purpose"] == "fine-tune"} == account.files
            assert {j["id"] for j in listed(f"{JOBS}?limit=100")} == account.jobs
            found = {a["name"]: a for a in listed("/v1/adapters")}
            assert {name: a["id"] for name, a in found.items()} == account.adapters
            assert {name: len(a["versions"]) for name, a in found.items()} == account.versions
            models = [m["id"] for m in listed("/v1/models")]
            assert models[0] == BASE
            assert len(models) == 1 + len(account.adapters) + sum(account.versions.values())
            assert all(account.user.owner in model for model in models[1:])
            sizes = [f["bytes"] for f in listed("/v1/files")]
            sizes += [version["bytes"] for adapter in found.values() for version in adapter["versions"]]
            used = http.get("/v1/quotas").raise_for_status().json()["used"]
            assert used["bytes"] == sum(sizes) + len(LINES) * len(account.uploads)
            assert used["adapters"] == len(account.adapters)

    @invariant()
    def nothing_names_the_other(self) -> None:
        if not hasattr(self, "accounts"):
            return
        for account, other in zip(self.accounts, self.accounts[::-1], strict=True):
            for path in ("/v1/files", JOBS, "/v1/adapters", "/v1/models", "/v1/quotas", "/v1/usage?group_by=adapter"):
                text = account.user.http.get(path).raise_for_status().text
                assert f'"{other.user.owner}' not in text, path
                assert not [identity for identity in other.ids if identity in text], path

    def teardown(self) -> None:
        if hasattr(self, "accounts"):
            self.try_the_others(1, "mine")
            self._erase(0)
            self.each_sees_their_own_and_no_more()
        self.server.hub.engine.check_integrity().result(60)


def a_file(other: Account, _: str) -> str:
    return min(other.files, default="")


def a_job(other: Account, _: str) -> str:
    return min(other.jobs, default="")


def an_adapter(other: Account, name: str) -> str:
    return other.adapters.get(name, "")


def a_model(other: Account, name: str) -> str:
    return f"{other.user.owner}/{name}" if name in other.adapters else ""


def an_upload(other: Account, _: str) -> str:
    return min(other.uploads, default="")


def a_part(other: Account, _: str) -> str:
    return min(other.parts, default="")


def an_owner(other: Account, _: str) -> str:
    return other.user.owner


Verb = tuple[Callable[[Account, str], str], str, str, dict[str, Any] | None]
VERBS: dict[str, Verb] = {
    "read a file": (a_file, "GET", "/v1/files/ID", None),
    "read what is in it": (a_file, "GET", "/v1/files/ID/content", None),
    "delete it": (a_file, "DELETE", "/v1/files/ID", None),
    "train with it": (a_file, "POST", JOBS, {"model": BASE, "training_file": "ID"}),
    "files after it": (a_file, "GET", "/v1/files?after=ID", None),
    "read a job": (a_job, "GET", f"{JOBS}/ID", None),
    "cancel it": (a_job, "POST", f"{JOBS}/ID/cancel", None),
    "its events": (a_job, "GET", f"{JOBS}/ID/events", None),
    "its checkpoints": (a_job, "GET", f"{JOBS}/ID/checkpoints", None),
    "pause it": (a_job, "POST", f"{JOBS}/ID/pause", None),
    "resume it": (a_job, "POST", f"{JOBS}/ID/resume", None),
    "jobs after it": (a_job, "GET", f"{JOBS}?after=ID", None),
    "add to an upload": (an_upload, "POST", "/v1/uploads/ID/parts", None),
    "complete it": (an_upload, "POST", "/v1/uploads/ID/complete", {"part_ids": ["part_1"]}),
    "call it off": (an_upload, "POST", "/v1/uploads/ID/cancel", None),
    "take a part of it": (a_part, "POST", "/v1/uploads/MINE/complete", {"part_ids": ["ID"]}),
    "export everything": (an_owner, "GET", "/admin/users/ID/export", None),
    "erase everything": (an_owner, "DELETE", "/admin/users/ID", None),
    "read an adapter": (an_adapter, "GET", "/v1/adapters/ID", None),
    "download it": (an_adapter, "GET", "/v1/adapters/ID/download", None),
    "pin it": (an_adapter, "POST", "/v1/adapters/ID/pin", None),
    "unpin it": (an_adapter, "POST", "/v1/adapters/ID/unpin", None),
    "prefetch it": (an_adapter, "POST", "/v1/adapters/ID/prefetch", None),
    "roll it back": (an_adapter, "POST", "/v1/adapters/ID/rollback", None),
    "promote in it": (an_adapter, "POST", "/v1/adapters/ID/versions/1/promote", None),
    "its versions": (an_adapter, "GET", "/v1/adapters/ID/versions", None),
    "split it": (an_adapter, "PUT", "/v1/adapters/ID/split", {"percent": {"1": 10}}),
    "end its split": (an_adapter, "DELETE", "/v1/adapters/ID/split", None),
    "throw it away": (an_adapter, "DELETE", "/v1/adapters/ID", None),
    "read a model": (a_model, "GET", "/v1/models/ID", None),
    "delete a model": (a_model, "DELETE", "/v1/models/ID", None),
    "ask it": (a_model, "POST", CHAT, {"model": "ID", "messages": HELLO, "max_tokens": 1}),
    "continue with it": (a_model, "POST", "/v1/completions", {"model": "ID", "prompt": "a", "max_tokens": 1}),
    "train it further": (a_model, "POST", JOBS, {"model": "ID", "training_file": "file-1"}),
}


def run(server: Server, adapters: list[PeftFiles]) -> None:
    TwoOwners.server, TwoOwners.adapters = server, adapters
    run_state_machine_as_test(
        TwoOwners,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_whatever_names_a_thing_in_its_path_is_tried_at_the_others_door() -> None:
    named = {endpoint for endpoint, _ in endpoints(application()) if "{" in endpoint[1] and "/v1" in endpoint[1]}
    tried = {
        (method, path)
        for method, path in named
        for _, how, where, _ in VERBS.values()
        if how == method and re.fullmatch(re.sub(r"{\w+}", "[^/]+", path), where.partition("?")[0])
    }
    assert named
    assert named - tried == set()


def test_neither_owner_ever_sees_or_changes_the_others(
    server: Server, adapter: PeftFiles, other_adapter: PeftFiles
) -> None:
    run(server, [adapter, other_adapter])


def test_a_leak_does_not_go_unnoticed(
    server: Server, adapter: PeftFiles, other_adapter: PeftFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def anybodys(store: FileStore, _: str, identity: str) -> StoredFile:
        row = store._database.row("select * from files where id = ?", (identity,))
        if row is None:
            raise NotFound(f"You have no file {identity[:80]!r}. `GET /v1/files` lists yours.", param="id")
        return StoredFile(**row)

    monkeypatch.setattr(FileStore, "get", anybodys)
    with pytest.raises(AssertionError):
        run(server, [adapter, other_adapter])
