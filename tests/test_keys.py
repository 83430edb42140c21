"""API keys: what each may do, until when, and that a revoked one is good for nothing at once, wherever it was revoked;
and, over all routes that there are, that each demands a key and its scope and tells nobody of another's."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi.routing import iter_route_contexts
from sqlite_utils import Database as PlainDatabase

from adapterhub.api.auth import Needs
from adapterhub.api.tenancy import keys as tenancy_keys
from adapterhub.api.tenancy.keys import ApiKey, KeyStore, State
from adapterhub.api.tenancy.terms import EVERYDAY, Scope
from adapterhub.errors import BadRequest, NotFound
from adapterhub.swap.database import Database, now
from tests.serving import (
    BASE,
    PeftFiles,
    Server,
    User,
    chat_lines,
    eventually,
    process,
    run_cli,
    running,
    save_base,
    small_config,
)

HELLO: list[Any] = [{"role": "user", "content": "Hello there"}]
OPEN = {("GET", path) for path in ("/healthz", "/readyz", "/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc")}
OPERATORS = ("/admin", "/metrics")


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path / "hub.db")
    yield opened
    opened.close()


@pytest.fixture
def keys(database: Database) -> KeyStore:
    return KeyStore(database)


def status(url: str, key: str, path: str = "/v1/models") -> int:
    return httpx.get(f"{url}{path}", headers={"Authorization": f"Bearer {key}"}).status_code


# -- the store


def test_a_key_is_found_by_its_secret_which_is_stored_nowhere(keys: KeyStore, database: Database) -> None:
    made = keys.make("mira", {Scope.INFER}, project="app", expires_at=now() + 100)
    assert keys.find(made.secret) == made.key == keys.get(made.key.id)
    assert (made.key.owner, made.key.project, made.key.scopes) == ("mira", "app", {Scope.INFER})
    assert keys.find(made.secret[:-1]) is None
    stored = json.dumps(database.rows("select * from keys"))
    assert made.secret not in stored
    assert made.secret.removeprefix("sk-ah-")[4:-4] not in stored
    assert made.key.hint is not None
    assert made.secret.startswith(made.key.hint.partition("...")[0])
    assert made.secret.endswith(made.key.hint.partition("...")[2])


def test_keys_are_listed_by_owner_and_project_newest_first(keys: KeyStore) -> None:
    one = keys.make("mira", EVERYDAY, project="app").key
    two = keys.make("mira", EVERYDAY, project="site").key
    three = keys.make("teo", EVERYDAY, project="app").key
    assert keys.list() == [three, two, one]
    assert keys.list("mira") == [two, one]
    assert keys.list("mira", "app") == [one]
    assert keys.list("nobody") == []


@pytest.mark.parametrize(
    "wrong",
    [{"owner": "a/b"}, {"project": ""}, {"scopes": frozenset()}, {"expires_at": 1}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_key_that_could_not_be_used_is_not_made(keys: KeyStore, wrong: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"owner": "mira", "scopes": EVERYDAY, **wrong}
    with pytest.raises(BadRequest):
        keys.make(fields.pop("owner"), fields.pop("scopes"), **fields)
    assert keys.list() == []


def test_a_key_expires_at_its_time(keys: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    time = now()
    monkeypatch.setattr(tenancy_keys, "now", lambda: time)
    made = keys.make("mira", EVERYDAY, expires_at=time + 10)
    time += 9
    assert state(keys, made.secret) is State.ACTIVE
    time += 1
    assert state(keys, made.secret) is State.EXPIRED
    with pytest.raises(BadRequest, match="expired"):
        keys.rotate(made.key.id, 60)


def test_a_rotated_key_is_good_for_the_grace_period_and_the_new_one_may_do_the_same(
    keys: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = now()
    monkeypatch.setattr(tenancy_keys, "now", lambda: time)
    old = keys.make("mira", {Scope.INFER, Scope.READ}, project="app", expires_at=time + 100)
    new = keys.rotate(old.key.id, 30)
    same = ("owner", "project", "scopes", "expires_at")
    assert [getattr(new.key, name) for name in same] == [getattr(old.key, name) for name in same]
    time += 29
    assert (state(keys, old.secret), state(keys, new.secret)) == (State.ACTIVE, State.ACTIVE)
    time += 1
    assert (state(keys, old.secret), state(keys, new.secret)) == (State.EXPIRED, State.ACTIVE)
    newer = keys.rotate(new.key.id, 1000)
    assert keys.get(new.key.id).expires_at == old.key.expires_at, "a grace period does not prolong a key"
    assert keys.get(newer.key.id).expires_at == old.key.expires_at


def test_a_key_revoked_through_another_connection_is_revoked_at_once(keys: KeyStore, tmp_path: Path) -> None:
    kept, gone = keys.make("mira", EVERYDAY), keys.make("mira", EVERYDAY)
    other = Database(tmp_path / "hub.db")
    revoked = KeyStore(other).revoke(gone.key.id)
    assert state(keys, gone.secret) is State.REVOKED
    assert state(keys, kept.secret) is State.ACTIVE
    assert KeyStore(other).revoke(gone.key.id) == revoked, "the first time stays"
    other.close()
    ended = dict.fromkeys([gone.key.id, "key-unknown"], State.REVOKED)
    assert keys.ended([kept.key.id, gone.key.id, "key-unknown"]) == ended
    with pytest.raises(BadRequest, match="revoked"):
        keys.rotate(gone.key.id, 60)
    with pytest.raises(NotFound):
        keys.revoke("key-unknown")


def test_last_uses_are_noted_in_memory_and_written_together(keys: KeyStore, database: Database) -> None:
    one, two = (keys.make("mira", EVERYDAY).key for _ in range(2))
    keys.note_use(one)
    assert keys.get(one.id).last_used_at is None
    keys.save_uses()
    used = keys.get(one.id).last_used_at
    assert used is not None
    assert 0 <= now() - used < 60
    assert keys.get(two.id).last_used_at is None
    keys.save_uses()
    assert keys.get(one.id).last_used_at == used


def test_erasing_removes_an_owners_keys_and_no_others(keys: KeyStore, database: Database) -> None:
    gone = [keys.create("mira") for _ in range(2)]
    kept = keys.create("teo")
    assert keys.erase("mira") == 2
    assert [keys.find(secret) for secret in gone] == [None, None]
    assert state(keys, kept) is State.ACTIVE
    assert [row["name"] for row in database.rows("select name from owners")] == ["teo"]
    assert keys.erase("mira") == 0


def test_keys_from_before_there_were_scopes_may_do_what_they_could(tmp_path: Path) -> None:
    path = tmp_path / "hub.db"
    before = PlainDatabase(sqlite3.connect(path))
    tenancy_keys.migrations.apply(before, stop_before="add_scopes")
    before.execute("insert into owners values ('mira', 5), ('root', 5)")
    for secret, owner, admin in (("sk-ah-one", "mira", 0), ("sk-ah-two", "root", 1)):
        before.execute("insert into keys values (?, ?, ?, 5)", [tenancy_keys._hash(secret), owner, admin])
    before.conn.commit()
    before.close()
    database = Database(path)
    keys = KeyStore(database)
    one, two = (found(keys, secret) for secret in ("sk-ah-one", "sk-ah-two"))
    assert (one.owner, one.scopes, one.created_at, one.state) == ("mira", EVERYDAY, 5, State.ACTIVE)
    assert (two.owner, two.scopes) == ("root", frozenset(Scope))
    assert one.id != two.id
    database.close()


def found(keys: KeyStore, secret: str) -> ApiKey:
    key = keys.find(secret)
    assert key is not None
    return key


def state(keys: KeyStore, secret: str) -> State:
    return found(keys, secret).state


# -- over HTTP


def test_an_admin_makes_lists_rotates_and_revokes_keys(server: Server, user: User) -> None:
    http = server.admin.http
    body = {"owner": user.owner, "project": "app", "scopes": ["read"], "expires_in": 1000}
    made = http.post("/admin/keys", json=body).raise_for_status().json()
    assert status(server.url, made["key"]) == 200
    assert (made["owner"], made["project"], made["scopes"], made["state"]) == (user.owner, "app", ["read"], "active")
    assert 900 < made["expires_at"] - made["created_at"] <= 1000
    shown = http.get(f"/admin/keys/{made['id']}").raise_for_status().json()
    assert "key" not in shown
    listed = http.get("/admin/keys", params={"owner": user.owner}).raise_for_status().json()["data"]
    assert [key["project"] for key in listed] == ["app", "default"]
    assert [key["id"] for key in listed if key["project"] == "app"] == [made["id"]]
    rotated = http.post(f"/admin/keys/{made['id']}/rotate", json={"grace_seconds": 500}).raise_for_status().json()
    assert {name: rotated[name] for name in ("owner", "project", "scopes", "expires_at")} == {
        name: made[name] for name in ("owner", "project", "scopes", "expires_at")
    }
    assert [status(server.url, key["key"]) for key in (made, rotated)] == [200, 200]
    revoked = http.delete(f"/admin/keys/{made['id']}").raise_for_status().json()
    assert revoked["state"] == "revoked"
    assert [status(server.url, key["key"]) for key in (made, rotated)] == [401, 200]
    assert http.delete("/admin/keys/key-none").status_code == 404


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"owner": "a b"},
        {"owner": "mira", "scopes": []},
        {"owner": "mira", "scopes": ["all"]},
        {"owner": "mira", "expires_in": 0},
        {"owner": "mira", "expires_in": "1d"},
        {"owner": "mira", "expire": 5},
    ],
    ids=str,
)
def test_a_key_that_is_asked_for_wrongly_is_refused(server: Server, body: Any) -> None:
    answer = server.admin.http.post("/admin/keys", json=body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_a_revoked_and_an_expired_key_are_told_apart_by_who_has_them(server: Server, user: User) -> None:
    def code(secret: str) -> str:
        answer = httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {secret}"})
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        return answer.json()["error"]["code"]

    made = server.hub.keys.make(user.owner, EVERYDAY)
    server.hub.keys.rotate(made.key.id, 0)
    assert code(made.secret) == "api_key_expired"
    server.hub.keys.revoke(made.key.id)
    assert code(made.secret) == "api_key_revoked"
    assert code("sk-ah-unknown") == "invalid_api_key"


def test_the_last_use_of_a_key_shows(server: Server, user: User) -> None:
    user.openai.models.list()
    [key] = server.hub.keys.list(user.owner)
    path = f"/admin/keys/{key.id}"
    used = eventually(lambda: server.admin.http.get(path).raise_for_status().json()["last_used_at"])
    assert key.created_at <= used <= now()


@pytest.mark.parametrize(
    ("how", "end"), [("revoked", KeyStore.revoke), ("expired", lambda keys, identity: keys.rotate(identity, 0))]
)
def test_a_stream_whose_key_is_revoked_or_expires_ends_with_an_error_and_others_go_on(
    server: Server, user: User, how: str, end: Callable[[KeyStore, str], Any]
) -> None:
    made = server.hub.keys.make(user.owner, EVERYDAY)
    other = server.as_user(user.owner, made.secret)
    kept, cut = (endless(who) for who in (user, other))
    next(kept), next(cut)
    end(server.hub.keys, made.key.id)
    with pytest.raises(openai.APIError, match=f"{how} while it ran") as caught:
        list(cut)
    assert caught.value.code == f"api_key_{how}"
    assert list(kept)[-1].choices[0].finish_reason == "length"
    with pytest.raises(openai.AuthenticationError):
        other.ask(BASE)
    eventually(lambda: server.engine_stats()["running"] == 0)


def endless(who: User, **options: Any) -> Iterator[Any]:
    """A stream that ends when the context is full."""
    extra = {"ignore_eos": True}
    return iter(
        who.openai.chat.completions.create(
            model=BASE, messages=HELLO, stream=True, temperature=0, extra_body=extra, **options
        )
    )


def test_a_key_revoked_on_the_command_line_beside_a_running_server_ends_its_stream(tmp_path: Path) -> None:
    base = save_base(tmp_path / BASE, context=1 << 17)  # its stream outlasts a command, however slowly that starts
    with process(base, tmp_path / "data") as server:
        server.start()
        user = server.user("mira", server.create_key("mira", "--scope", "infer"))
        stream = endless(user)
        next(stream)
        ran = run_cli("keys", "revoke", user.key, "--data-dir", str(server.data_dir))
        assert (ran.returncode, ran.stderr) == (0, "")
        with pytest.raises(openai.APIError, match="was revoked while it ran"):
            list(stream)
        with pytest.raises(openai.AuthenticationError, match="was revoked"):
            user.ask(BASE)


# -- the command line


def test_the_command_line_makes_lists_rotates_and_revokes(tmp_path: Path) -> None:
    def ran(*arguments: str) -> str:
        done = run_cli("keys", *arguments, "--data-dir", str(tmp_path))
        assert done.returncode == 0, done.stderr
        return done.stdout

    secret = ran("create", "mira", "--scope", "infer", "--scope", "read", "--project", "app", "--expires", "90d")
    assert re.fullmatch(r"sk-ah-\S+\n", secret)
    admin = ran("create", "root", "--admin")
    [shown] = json.loads(ran("list", "--owner", "mira", "--json"))
    assert (shown["project"], shown["scopes"], shown["state"]) == ("app", ["infer", "read"], "active")
    assert 89 * 86400 < shown["expires_at"] - shown["created_at"] <= 90 * 86400
    assert secret.strip() not in ran("list")
    new = ran("rotate", shown["id"], "--grace", "1h")
    assert re.fullmatch(r"sk-ah-\S+\n", new)
    assert re.search(r"active, \S+ \S+ left", ran("list", "--owner", "mira"))
    ran("revoke", secret.strip(), json.loads(ran("list", "--owner", "root", "--json"))[0]["id"])
    assert [key["state"] for key in json.loads(ran("list", "--all", "--json"))] == ["active", "revoked", "revoked"]
    assert len(json.loads(ran("list", "--json"))) == 1
    failed = run_cli("keys", "revoke", admin.strip()[:-1] + "~", "--data-dir", str(tmp_path))
    assert failed.returncode == 1
    assert admin.strip()[8:-1] not in failed.stderr


# -- every route


def each(app: Any) -> Iterator[tuple[str, str, Any]]:
    """Method, path and dependencies of every route."""
    for route in iter_route_contexts(app.routes):
        for method in sorted(route.methods or ()):
            if method != "HEAD":
                yield method, route.path, getattr(route, "dependant", None)


def below(dependant: Any) -> Iterator[Any]:
    """A route's dependencies, with theirs."""
    yield dependant
    for each in dependant.dependencies:
        yield from below(each)


def needs(dependant: Any) -> list[Needs]:
    return [found.call for found in below(dependant) if isinstance(found.call, Needs)]


@pytest.fixture(scope="module")
def app_and_server(base_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Server]]:
    apps: list[Any] = []
    config = small_config(base_directory, tmp_path_factory.mktemp("routes"))
    with running(config, change=apps.append) as started:
        yield apps[0], started


def test_every_route_but_those_that_tell_nothing_demands_a_key_and_its_scope(
    app_and_server: tuple[Any, Server],
) -> None:
    app, server = app_and_server
    tried = 0
    for method, path, dependant in each(app):
        if (method, path) in OPEN:
            continue
        [need] = needs(dependant)
        wanted = frozenset(need.scopes)
        assert (wanted == {Scope.ADMIN}) == path.startswith(OPERATORS), path
        if not path.startswith(OPERATORS):
            assert (Scope.TRAIN in wanted) == (method != "GET" and Scope.INFER not in wanted), (method, path)
        for scopes, refused in ((None, 401), (frozenset(Scope) - wanted, 403)):
            headers = {}
            if scopes is not None:
                headers["Authorization"] = f"Bearer {server.hub.keys.make('mira', scopes).secret}"
            answer = ask(server, method, path, headers)
            assert answer.status_code == refused, (method, path, answer.text)
            assert answer.json()["error"]["code"] == {401: "missing_api_key", 403: "insufficient_permissions"}[refused]
        tried += 1
    assert tried > 30


BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("POST", "/v1/chat/completions"): {"json": {"model": BASE, "messages": HELLO}},
    ("POST", "/v1/completions"): {"json": {"model": BASE, "prompt": "Hello"}},
    ("POST", "/v1/files"): {"data": {"purpose": "fine-tune"}, "files": {"file": ("a.jsonl", b"{}")}},
    ("POST", "/v1/uploads"): {"json": {"bytes": 2, "filename": "a", "mime_type": "text/plain", "purpose": "fine-tune"}},
    ("POST", "/v1/uploads/{upload_id}/parts"): {"files": {"data": ("a", b"{}")}},
    ("POST", "/v1/uploads/{upload_id}/complete"): {"json": {"part_ids": ["part-none"]}},
    ("POST", "/v1/fine_tuning/jobs"): {"json": {"model": BASE, "training_file": "file-none"}},
}


def ask(server: Server, method: str, path: str, headers: dict[str, str], **ids: str) -> httpx.Response:
    """A request that would be good, or could be, with a key that may make it."""
    filled = re.sub(r"{(\w+)(:path)?}", lambda found: ids.get(found[1], "x-none"), path)
    more = BODIES.get((method, path), {"json": {}} if method in ("PUT", "PATCH", "POST") else {})
    return httpx.request(method, f"{server.url}{filled}", headers=headers, timeout=60, **more)


class Ids:
    """What somebody else has, and names of nothing that look alike."""

    def __init__(self, owner: User) -> None:
        self.file = owner.upload(chat_lines())
        self.job = owner.train(chat_lines(), suffix="mine", n_epochs=1)
        job = owner.job(self.job, "succeeded")
        [self.adapter] = owner.http.get("/v1/adapters").json()["data"]
        self.version = self.adapter["versions"][0]["id"]
        model = job.fine_tuned_model
        self.models = [
            (model, model[:-12] + "0" * 12),
            (f"{owner.owner}/mine", f"{owner.owner}/none"),
            (f"{owner.owner}/mine@1", f"{owner.owner}/mine@9"),
        ]
        fields: Any = {"filename": "a", "mime_type": "text/plain", "purpose": "fine-tune"}
        self.upload = owner.openai.uploads.create(bytes=2, **fields).id
        self.by_parameter = {
            "upload_id": [(self.upload, unknown(self.upload))],
            "file_id": [(self.file, unknown(self.file))],
            "job_id": [(self.job, unknown(self.job))],
            "adapter_id": [(self.adapter["id"], unknown(self.adapter["id"]))],
            "version": [("1", "9"), (self.version, "0" * 12)],
            "name": [(theirs.replace("/", "%2F"), none.replace("/", "%2F")) for theirs, none in self.models],
        }


def unknown(identity: str) -> str:
    prefix, _, rest = identity.rpartition("-")
    return f"{prefix}-{'0' * len(rest)}"


@pytest.fixture(scope="module")
def theirs(app_and_server: tuple[Any, Server]) -> Ids:
    return Ids(app_and_server[1].user())


def test_what_another_owner_has_answers_as_what_there_is_not_on_every_route(
    app_and_server: tuple[Any, Server], theirs: Ids
) -> None:
    app, server = app_and_server
    me = server.user()
    headers = {"Authorization": f"Bearer {me.key}"}
    tried = set()
    for method, path, _ in each(app):
        parameters = re.findall(r"{(\w+)", path)
        if path.startswith("/admin") or not parameters:
            continue
        new = set(parameters) - theirs.by_parameter.keys()
        assert not new, f"say in `Ids` what {new} of {path} can be of another owner's"
        for theirs_first, none_first in theirs.by_parameter[parameters[0]]:
            rest = {name: theirs.by_parameter[name][0][0] for name in parameters[1:]}
            same(
                lambda identity: ask(server, method, path, headers, **{parameters[0]: identity}, **rest),  # noqa: B023
                theirs_first,
                none_first,
            )
        tried.add((method, path))
    assert len(tried) > 15


def test_what_another_owner_has_is_no_cursor_on_any_route(app_and_server: tuple[Any, Server], theirs: Ids) -> None:
    app, server = app_and_server
    me = server.user()
    mine = Ids(me)  # so that lists of what belongs to a thing can be asked for
    ids = {name: found[0][0] for name, found in mine.by_parameter.items()}
    tried = 0
    for _, path, dependant in each(app):
        if path.startswith("/admin") or dependant is None or path == "/v1/usage":
            continue
        if not any(parameter.name == "after" for found in below(dependant) for parameter in found.query_params):
            continue
        filled = re.sub(r"{(\w+)(:path)?}", lambda found: ids[found[1]], path)
        for known in (theirs.file, theirs.job, theirs.adapter["id"], theirs.version):
            same(lambda after: me.http.get(filled, params={"after": after}), known, unknown(known))  # noqa: B023
        tried += 1
    assert tried >= 4


def test_what_another_owner_has_cannot_be_named_in_a_body(app_and_server: tuple[Any, Server], theirs: Ids) -> None:
    _, server = app_and_server
    me = server.user()

    def posting(path: str, field: str, **body: Any) -> Callable[[str], httpx.Response]:
        return lambda identity: me.http.post(path, json={**body, field: identity})

    for name, none in theirs.models:
        same(posting("/v1/chat/completions", "model", messages=HELLO), name, none)
        same(posting("/v1/completions", "model", prompt="Hello"), name, none)
        same(posting("/v1/fine_tuning/jobs", "model", training_file=me.upload(chat_lines())), name, none)
    for field in ("training_file", "validation_file"):
        body = {"training_file": me.upload(chat_lines())} if field == "validation_file" else {}
        same(posting("/v1/fine_tuning/jobs", field, model=BASE, **body), theirs.file, unknown(theirs.file))


def same(asking: Callable[[str], httpx.Response], theirs: str, none: str) -> None:
    """That two names, of something of another owner's and of nothing, get one answer, which is an error."""
    answers = [asking(identity) for identity in (theirs, none)]
    texts = [
        answer.text.replace(identity, "ID").replace(identity.replace("%2F", "/"), "ID")
        for answer, identity in zip(answers, (theirs, none), strict=True)
    ]
    assert texts[0] == texts[1]
    said = [
        {name: value for name, value in answer.headers.items() if name not in ("x-request-id", "date")}
        for answer in answers
    ]
    if len(theirs) == len(none):
        assert said[0] == said[1]
    assert answers[0].status_code == answers[1].status_code
    assert answers[0].status_code in (400, 404), answers[0].request.url


def test_that_somebody_else_has_the_very_same_adapter_shows_nowhere(server: Server, adapter: PeftFiles) -> None:
    one, other = server.user(), server.user()
    theirs = one.import_adapter(adapter, "mine")
    one.tier(theirs["model"])
    one.tier(theirs["model"])
    found = other.import_adapter(adapter, "mine")
    assert one.http.get(f"/v1/adapters/{theirs['id']}").json()["tier"] == "device"
    assert found["tier"] == "disk"
    assert found["versions"][0]["digest"] != theirs["versions"][0]["digest"]
    assert other.tier(found["model"]) == "disk"
    one.http.delete(f"/v1/adapters/{theirs['id']}").raise_for_status()
    assert other.tier(found["model"]) == "device"
