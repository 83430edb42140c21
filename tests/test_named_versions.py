"""Versions as users and operators meet them: over HTTP, through OpenAI's SDK, and on the command line."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest

from adapterhub.swap.block import Block
from adapterhub.swap.versions import Kind, Version
from tests.serving import BASE, SECONDS, PeftFiles, Server, User, eventually, run_cli
from tests.test_admin import names, tiers
from tests.test_cli import failed, ran


@dataclass
class Shelf:
    """An owner's adapter `mine`, to which versions are published as a job does it."""

    server: Server
    user: User
    files: tuple[PeftFiles, PeftFiles]

    def publish(self, which: int, kind: Kind = Kind.RELEASE, *, scale: float | None = None, **more: Any) -> Version:
        """The block of `files[which]`, or one of its own with its numbers scaled."""
        imported = self.user.import_adapter(self.files[which], "scratch")
        registry = self.server.hub.registry
        block = registry.block(registry.version(self.user.owner, imported["current"]))
        if scale is not None:
            block = Block(block.meta, block.payload * scale, None)
        more = {"origin": "ftjob-1", **more}
        return registry.publish(self.user.owner, "mine", block, BASE, kind=kind, **more)

    @property
    def name(self) -> str:
        return f"{self.user.owner}/mine"

    def path(self, version: Version, *more: str, above: str = "/v1") -> str:
        return "/".join((f"{above}/adapters/{version.adapter}", *more))

    def answered_by(self, model: str, **more: Any) -> str:
        """The version that answers, by the header."""
        body = {"model": model, "prompt": [5, 6, 7], "max_tokens": 1, **more}
        answer = self.user.http.post("/v1/completions", json=body).raise_for_status()
        assert answer.json()["model"] == model
        return answer.headers["x-adapterhub-version"]


@pytest.fixture
def shelf(server: Server, user: User, adapter: PeftFiles, other_adapter: PeftFiles) -> Shelf:
    return Shelf(server, user, (adapter, other_adapter))


def refused(answer: httpx.Response) -> tuple[int, str, str]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["message"]


# -- names


def test_a_candidate_answers_by_its_own_names_and_by_the_adapters_once_it_is_promoted(shelf: Shelf) -> None:
    candidate = shelf.publish(0, Kind.CANDIDATE)
    with pytest.raises(openai.NotFoundError, match="no release yet, only 1 candidate") as unreleased:
        shelf.user.ask(shelf.name)
    assert unreleased.value.code == "model_not_found"
    assert candidate.model in unreleased.value.message
    said = shelf.user.ask(candidate.model)
    assert shelf.user.ask(f"{shelf.name}@candidate") == shelf.user.ask(f"{shelf.name}@1") == said
    promoted = shelf.user.http.post(shelf.path(candidate, "versions/candidate/promote")).raise_for_status().json()
    assert (promoted["current"], promoted["versions"][0]["kind"]) == (candidate.id, "release")
    assert shelf.user.ask(shelf.name) == said
    assert shelf.answered_by(shelf.name) == candidate.id


def test_models_are_all_releases_candidates_and_checkpoints_under_names_that_answer(shelf: Shelf) -> None:
    made = [
        shelf.publish(0),
        shelf.publish(1, Kind.CHECKPOINT, step=5),
        shelf.publish(1, Kind.CANDIDATE),
    ]
    listed = [model.id for model in shelf.user.openai.models.list() if "scratch" not in model.id]
    assert sorted(listed) == sorted([BASE, shelf.name, *(version.model for version in made)])
    assert made[1].model.endswith(":ckpt-step-5")
    for version in made:
        assert shelf.answered_by(version.model) == version.id
        assert shelf.user.openai.models.retrieve(version.model).id == version.model
    assert shelf.user.openai.models.retrieve(f"{shelf.name}@candidate").id == f"{shelf.name}@candidate"


def test_a_name_with_which_version_deletes_that_version_and_the_bare_name_all(shelf: Shelf) -> None:
    first, second = shelf.publish(0), shelf.publish(1)
    assert shelf.user.openai.models.delete(f"{shelf.name}@2").deleted
    assert shelf.answered_by(shelf.name) == first.id
    with pytest.raises(openai.NotFoundError):
        shelf.user.openai.models.delete(second.model)
    shelf.publish(1, Kind.CHECKPOINT, step=1)
    shelf.user.openai.models.delete(first.model)
    assert shelf.user.openai.models.delete(shelf.name).deleted, "it has no release, and may be deleted all the same"
    assert names(shelf.user, "/v1/adapters") == ["scratch"]


@pytest.mark.parametrize("name", ["{}@9", "{}@", "{}@candidate", "{}@previous", "{}@@1", "{}@1:ckpt-step-1", "{}:1"])
def test_a_name_that_means_none_of_the_versions_is_not_found(shelf: Shelf, name: str) -> None:
    shelf.publish(0)
    with pytest.raises(openai.NotFoundError) as unknown:
        shelf.user.ask(name.format(shelf.name))
    assert unknown.value.code == "model_not_found"


# -- lists


def test_the_versions_of_an_adapter_say_what_each_is_and_what_it_gets(shelf: Shelf) -> None:
    first, second = shelf.publish(0), shelf.publish(1)
    step = shelf.publish(0, Kind.CHECKPOINT, step=3, metrics={"full_valid_loss": 0.5})
    path = shelf.path(first, "versions")
    listed = shelf.user.http.get(path).raise_for_status().json()
    shown = [(v["id"], v["object"], v["number"], v["kind"], v["step"], v["percent"]) for v in listed["data"]]
    assert shown == [
        (step.id, "adapter.version", None, "checkpoint", 3, 0),
        (second.id, "adapter.version", 2, "release", None, 100),
        (first.id, "adapter.version", 1, "release", None, 0),
    ]
    assert [v["current"] for v in listed["data"]] == [False, True, False]
    assert listed["data"][0]["metrics"] == {"full_valid_loss": 0.5}
    assert [was["version"] for was in listed["history"]] == [second.id, first.id]
    page = shelf.user.http.get(path, params={"limit": 2}).json()
    assert (page["has_more"], [v["id"] for v in page["data"]]) == (True, [step.id, second.id])
    rest = shelf.user.http.get(path, params={"after": page["last_id"]}).json()
    assert (rest["has_more"], [v["id"] for v in rest["data"]]) == (False, [first.id])
    assert refused(shelf.user.http.get(path, params={"after": "none"}))[:2] == (400, "invalid_value")
    assert shelf.server.admin.http.get(shelf.path(first, "versions", above="/admin")).json() == listed


def test_top_shows_an_adapter_without_a_release_once_it_was_used(shelf: Shelf) -> None:
    candidate = shelf.publish(1, Kind.CANDIDATE)
    assert shelf.name not in ran("top", "--once", "--rows", "1000", user=shelf.server.admin)
    shelf.answered_by(candidate.model)
    [line] = [line for line in ran("top", "--once", user=shelf.server.admin).splitlines() if shelf.name in line]
    assert re.fullmatch(rf"{shelf.name}\s+1\s+1\s+\d+ s ago", line.strip()), "one hit, one load, and no size of its own"


def test_an_adapter_without_a_release_is_listed_and_what_needs_one_is_refused(shelf: Shelf) -> None:
    candidate = shelf.publish(1, Kind.CANDIDATE)
    for sort in ("name", "-bytes", "created", "hits"):
        assert sorted(names(shelf.user, "/v1/adapters", sort=sort)) == ["mine", "scratch"]
    assert names(shelf.user, "/v1/adapters", sort="bytes", limit=1) == ["mine"]
    assert names(shelf.user, "/v1/adapters", sort="bytes", limit=1, after=candidate.adapter) == ["scratch"]
    assert "mine" not in names(shelf.user, "/v1/adapters", tier="disk")
    shown = shelf.user.http.get(shelf.path(candidate)).json()
    unset = ("current", "bytes", "rank", "tier", "split", "pinned")
    assert {field: shown[field] for field in unset} == dict.fromkeys(unset)
    admin = shelf.server.admin.http
    for answer in (
        shelf.user.http.post(shelf.path(candidate, "pin")),
        admin.post(shelf.path(candidate, "pin", above="/admin")),
        shelf.user.http.post(shelf.path(candidate, "prefetch")),
        shelf.user.http.get(shelf.path(candidate, "download")),
        shelf.user.http.post(shelf.path(candidate, "rollback")),
        shelf.user.http.put(shelf.path(candidate, "split"), json={"percent": {"candidate": 10}}),
    ):
        status, code, message = refused(answer)
        assert (status, code) == (400, "no_release")
        assert f"`adapterhub adapters promote {shelf.name} 1`" in message


# -- who may


ROUTES = [
    ("GET", "versions", None),
    ("POST", "versions/1/promote", None),
    ("POST", "rollback", None),
    ("PUT", "split", {"percent": {"1": 10}}),
    ("DELETE", "split", None),
]


@pytest.mark.parametrize(("method", "route", "body"), ROUTES)
def test_anothers_adapter_is_as_unknown_as_none_and_an_operator_needs_an_admin_key(
    shelf: Shelf, method: str, route: str, body: Any
) -> None:
    shelf.publish(0)
    mine = shelf.publish(1)
    stranger = shelf.server.user()
    theirs = stranger.http.request(method, shelf.path(mine, route), json=body)
    none = stranger.http.request(method, f"/v1/adapters/adapter-none/{route}", json=body)
    assert refused(theirs)[:2] == refused(none)[:2] == (404, "not_found")
    assert refused(theirs)[2].replace(mine.adapter, "adapter-none") == refused(none)[2]
    operators = shelf.path(mine, route, above="/admin")
    assert refused(shelf.user.http.request(method, operators, json=body))[:2] == (403, "insufficient_permissions")
    bare = httpx.request(method, f"{shelf.server.url}{shelf.path(mine, route)}", json=body)
    assert refused(bare)[:2] == (401, "missing_api_key")
    assert shelf.answered_by(shelf.name) == mine.id, "nothing has changed"
    assert shelf.server.admin.http.request(method, operators, json=body).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "percent"),
        ({"percent": {}}, "percent"),
        ({"percent": {"1": "10"}}, "percent.1"),
        ({"percent": {"1": 10.5}}, "percent.1"),
        ({"percent": {"1": True}}, "percent.1"),
        ({"percent": {"1": 0}}, "percent"),
        ({"percent": {"1": 101}}, "percent"),
        ({"percent": {"1": 10**30}}, "percent"),
        ({"percent": {"1": 10}, "user": "a"}, "user"),
        ([], None),
    ],
)
def test_a_split_that_means_nothing_is_refused_by_its_name(shelf: Shelf, body: Any, param: str | None) -> None:
    shelf.publish(0)
    current = shelf.publish(1)
    answer = shelf.user.http.put(shelf.path(current, "split"), json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert shelf.user.http.get(shelf.path(current)).json()["split"] is None


def test_a_body_that_is_no_upload_is_not_taken_in_as_one(shelf: Shelf) -> None:
    current = shelf.publish(0)
    answer = shelf.user.http.put(shelf.path(current, "split"), content=b'{"percent": {"' + b"1" * 9 * 2**20)
    assert refused(answer)[:2] == (413, "request_too_large")


# -- splits


def test_requests_for_a_split_name_go_by_the_shares_and_one_users_to_one_version(shelf: Shelf) -> None:
    current = shelf.publish(0)
    candidate = shelf.publish(1, Kind.CANDIDATE)
    shown = shelf.user.http.put(shelf.path(current, "split"), json={"percent": {"candidate": 50}}).json()
    assert shown["split"] == {candidate.id: 50, current.id: 50}
    assert [v["percent"] for v in shown["versions"]] == [50, 50]
    users = [f"user-{i}" for i in range(12)]
    answered = {user: shelf.answered_by(shelf.name, user=user) for user in users}
    assert Counter(answered.values()).keys() == {current.id, candidate.id}
    said = {version: shelf.user.ask(version.model) for version in (current, candidate)}
    for user, version in answered.items():
        text = shelf.user.ask(shelf.name, user=user)
        assert text == said[current if version == current.id else candidate], "chat goes as completions do"
    assert {shelf.answered_by(shelf.name) for _ in range(40)} == {current.id, candidate.id}
    assert shelf.answered_by(f"{shelf.name}@1", user=users[0]) == current.id, "who names a version gets it"
    assert shelf.answered_by(candidate.model) == candidate.id
    assert shelf.user.http.delete(shelf.path(current, "split")).json()["split"] is None
    assert {shelf.answered_by(shelf.name, user=user) for user in users} == {current.id}


def test_a_hint_brings_every_version_that_a_name_is_split_between(shelf: Shelf) -> None:
    current = shelf.publish(0)
    candidate = shelf.publish(1, Kind.CANDIDATE)
    shelf.user.http.put(shelf.path(current, "split"), json={"percent": {"candidate": 50}}).raise_for_status()
    shelf.server.evict(current.adapter)
    shelf.user.http.post(shelf.path(current, "prefetch")).raise_for_status()

    def on_device() -> bool:
        shown = shelf.user.http.get(shelf.path(candidate)).json()["versions"]
        return [v["tier"] for v in shown] == ["device", "device"]

    eventually(on_device)


# -- while requests run


def test_a_stream_ends_on_the_version_it_began_with(shelf: Shelf) -> None:
    old, new = shelf.publish(0), shelf.publish(1, Kind.CANDIDATE)
    fields: dict[str, Any] = {"max_tokens": 60, "temperature": 0, "extra_body": {"ignore_eos": True}}
    whole = shelf.user.ask(old.model, **fields)
    messages: Any = [{"role": "user", "content": "Hello there"}]
    stream = shelf.user.openai.chat.completions.create(model=shelf.name, messages=messages, stream=True, **fields)
    said = ""
    for at, chunk in enumerate(stream):
        if at == 2:
            shelf.user.http.post(shelf.path(new, f"versions/{new.id}/promote")).raise_for_status()
            assert shelf.answered_by(shelf.name) == new.id
        said += chunk.choices[0].delta.content or ""
    assert said == whole


def test_no_request_for_a_name_fails_while_what_it_means_changes(shelf: Shelf) -> None:
    made = [shelf.publish(0), shelf.publish(1)]
    known = {version.id for version in made}
    stop, faults, answered = threading.Event(), list[str](), Counter[str]()

    def ask(seed: int) -> None:
        while not stop.is_set():
            body = {"model": shelf.name, "prompt": [5, 6, seed], "max_tokens": 1}
            answer = shelf.user.http.post("/v1/completions", json=body)
            if answer.status_code != 200:
                faults.append(answer.text)
                return
            answered[answer.headers["x-adapterhub-version"]] += 1

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in (7, 8, 9)]
    for thread in threads:
        thread.start()
    http, path = shelf.user.http, shelf.path(made[0])
    for turn in range(10):
        http.put(f"{path}/split", json={"percent": {"previous": 50}}).raise_for_status()
        http.post(f"{path}/versions/1/promote").raise_for_status()
        candidate = shelf.publish(0, Kind.CANDIDATE, scale=1 + turn / 10)
        known.add(candidate.id)
        http.put(f"{path}/split", json={"percent": {"candidate": 30}}).raise_for_status()
        http.delete(f"/v1/models/{candidate.model}").raise_for_status()
        http.post(f"{path}/rollback").raise_for_status()
    stop.set()
    for thread in threads:
        thread.join(SECONDS)
    assert faults == []
    assert answered.keys() <= known
    assert len(answered) > 1


def test_a_version_that_is_deleted_while_a_request_waits_for_it_is_not_found(shelf: Shelf) -> None:
    """By its own name: nothing else can answer. It was not on the device, and its file goes before it is read."""
    version = shelf.publish(0, scale=2)
    found = threading.Event()
    engine, submit = shelf.server.hub.engine, shelf.server.hub.engine.submit

    def submit_late(request: Any) -> None:
        if not found.is_set():
            shelf.server.hub.forget([shelf.server.hub.registry.delete_version(shelf.user.owner, version.id)])
        found.set()
        submit(request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "submit", submit_late)
        with pytest.raises(openai.NotFoundError) as gone:
            shelf.user.ask(version.model, n=3)
    assert gone.value.code == "model_not_found"
    assert found.is_set()


def test_a_pin_goes_over_to_what_is_promoted_and_back_by_a_rollback(shelf: Shelf) -> None:
    old, new = shelf.publish(0), shelf.publish(1, Kind.CANDIDATE)
    before = tiers(shelf.server)["device"]["pinned"]
    shelf.user.http.post(shelf.path(old, "pin")).raise_for_status()
    pinned = lambda: tiers(shelf.server)["device"]["pinned"] - before  # noqa: E731
    shelf.user.tier(shelf.name)
    shelf.user.tier(new.model)
    assert pinned() == 1
    for change in (f"versions/{new.id}/promote", "rollback"):
        shelf.user.http.post(shelf.path(old, change)).raise_for_status()
        shelf.server.evict(old.adapter)
        shelf.user.tier(shelf.name)
        assert pinned() == 1
        shelf.user.tier((new if change == "rollback" else old).model)
        assert pinned() == 1
    shelf.user.openai.models.delete(shelf.name)
    assert pinned() == 0


# -- the command line


def test_the_command_line_lists_promotes_rolls_back_and_splits(shelf: Shelf) -> None:
    user = shelf.user
    first = shelf.publish(0)
    candidate = shelf.publish(1, Kind.CANDIDATE)
    step = shelf.publish(0, Kind.CHECKPOINT, step=4)
    listed = json.loads(ran("adapters", "versions", "mine", "--json", user=user))
    assert [v["id"] for v in listed["versions"]] == [step.id, candidate.id, first.id]
    assert ran("adapters", "promote", "mine", "candidate", user=user) == f"{shelf.name} is now {candidate.model}.\n"
    shown = ran("adapters", "versions", "mine", user=user)
    assert step.model in shown
    assert "candidate" not in shown
    assert re.search(rf"{shelf.name} has been version 2 for \d+ s; a rollback goes to 1\.$", shown.strip())
    assert step.model in ran("adapters", "promote", shelf.name, step.model, user=shelf.server.admin)
    assert candidate.model in ran("adapters", "rollback", shelf.name, user=shelf.server.admin)
    assert first.model in ran("adapters", "rollback", "mine", user=user)
    split = ran("adapters", "split", "mine", "2=10", f"{step.id}=5%", user=user)
    assert split.count("%") == 3
    for part in (f"{candidate.model} (10%)", f"{step.model} (5%)", f"{first.model} (85%)"):
        assert part in split
    assert " 85% " in ran("adapters", "show", "mine", user=user)
    ended = json.loads(ran("adapters", "split", "mine", "--end", "--json", user=user))
    assert (ended["split"], ended["current"]) == (None, first.id)


def test_the_command_line_shows_an_adapter_that_has_no_release(shelf: Shelf) -> None:
    shelf.publish(0, Kind.CANDIDATE)
    assert shelf.name in ran("adapters", "list", user=shelf.user)
    assert "no release" in ran("adapters", "show", "mine", user=shelf.user)
    assert " candidate " in ran("adapters", "versions", "mine", user=shelf.user)
    assert "adapters promote" in failed("chat", shelf.name, said="Hello\n", user=shelf.user)


def test_the_command_line_says_what_is_wrong_with_a_version_or_a_share(shelf: Shelf) -> None:
    shelf.publish(0)
    for arguments, message in (
        (["promote", "mine", "7"], f"{shelf.name} has no version '7'"),
        (["promote", "mine", "a/b"], "has no version 'a/b'"),
        (["rollback", "mine"], "Nothing was current before version 1"),
        (["split", "mine"], "Give shares as in `candidate=10`, or --end"),
        (["split", "mine", "1=10", "--end"], "Give shares as in `candidate=10`, or --end"),
        (["split", "mine", "10"], "'10' is no share"),
        (["split", "mine", "1=ten"], "'1=ten' is no share"),
        (["versions", "none"], "You have no adapter 'none'"),
    ):
        assert message in failed("adapters", *arguments, user=shelf.user)
    assert run_cli("adapters", "promote", "mine", user=shelf.user).returncode == 2
