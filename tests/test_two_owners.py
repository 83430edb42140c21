"""Two owners do whatever the API lets them, in any order: neither ever sees or changes what is the other's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from adapterhub.errors import NotFound
from adapterhub.train.files import FileStore, StoredFile
from tests.serving import BASE, PeftFiles, Server, User, chat_lines
from tests.test_bad_input import CHAT, HELLO, JOBS

NAMES = st.sampled_from(["mine", "yours"])  # both owners use the same names
WHO = st.sampled_from([0, 1])
EXAMPLES, STEPS = 8, 25


@dataclass
class Account:
    """An owner, and what they should have, as far as they were told."""

    user: User
    files: set[str] = field(default_factory=set)
    jobs: set[str] = field(default_factory=set)
    adapters: dict[str, str] = field(default_factory=dict)  # ids by name
    versions: dict[str, int] = field(default_factory=dict)  # how many, by name

    @property
    def ids(self) -> set[str]:
        return self.files | self.jobs | set(self.adapters.values())


class TwoOwners(RuleBasedStateMachine):
    server: Server
    adapters: list[PeftFiles]

    @initialize()
    def arrive(self) -> None:
        self.accounts = [Account(self.server.user()) for _ in range(2)]

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

    @rule(who=WHO, name=NAMES)
    def ask(self, who: int, name: str) -> None:
        account = self.accounts[who]
        body = {"model": f"{account.user.owner}/{name}", "messages": HELLO, "max_tokens": 1}
        status = account.user.http.post(CHAT, json=body).status_code
        assert status == (200 if name in account.adapters else 404)

    # -- at the other's door

    @rule(who=WHO, name=NAMES, data=st.data())
    def try_the_others(self, who: int, name: str, data: st.DataObject) -> None:
        """Whatever is asked of the other's things has the answer that things which are not there would have."""
        me, other = self.accounts[who].user.http, self.accounts[1 - who]
        verb = data.draw(st.sampled_from(sorted(VERBS)))
        what, method, path, body = VERBS[verb]
        if not (theirs := what(other, name)):
            return
        told = []
        for identity in (theirs, "x" * len(theirs)):
            options = {} if body is None else {"json": {k: identity if v == "ID" else v for k, v in body.items()}}
            answer = me.request(method, path.replace("ID", identity.replace("/", "%2F")), **options)
            assert answer.status_code in (400, 404), (verb, answer.text)
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
        self.server.hub.engine.check_integrity().result(60)


def a_file(other: Account, _: str) -> str:
    return min(other.files, default="")


def a_job(other: Account, _: str) -> str:
    return min(other.jobs, default="")


def an_adapter(other: Account, name: str) -> str:
    return other.adapters.get(name, "")


def a_model(other: Account, name: str) -> str:
    return f"{other.user.owner}/{name}" if name in other.adapters else ""


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
    "read an adapter": (an_adapter, "GET", "/v1/adapters/ID", None),
    "download it": (an_adapter, "GET", "/v1/adapters/ID/download", None),
    "pin it": (an_adapter, "POST", "/v1/adapters/ID/pin", None),
    "unpin it": (an_adapter, "POST", "/v1/adapters/ID/unpin", None),
    "prefetch it": (an_adapter, "POST", "/v1/adapters/ID/prefetch", None),
    "roll it back": (an_adapter, "POST", "/v1/adapters/ID/rollback", None),
    "promote in it": (an_adapter, "POST", "/v1/adapters/ID/versions/1/promote", None),
    "its versions": (an_adapter, "GET", "/v1/adapters/ID/versions", None),
    "split it": (an_adapter, "PUT", "/v1/adapters/ID/split", {"percent": {"1": 10}}),
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
