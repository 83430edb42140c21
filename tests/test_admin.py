"""`/admin`, and lists, pins and hints of `/v1/adapters`: what they show and do, for whom, and what they refuse."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import PreTrainedModel

from adapterhub.api import listing
from adapterhub.api.tenancy import keys
from adapterhub.swap.database import now
from tests.serving import SECONDS, PeftFiles, Server, User, chat_lines, eventually, running, small_config

ROUTES = [
    ("GET", "/admin/tiers"),
    ("GET", "/admin/adapters"),
    ("GET", "/admin/adapters/adapter-1"),
    ("GET", "/admin/adapters/adapter-1/download"),
    ("DELETE", "/admin/adapters/adapter-1"),
    *(("POST", f"/admin/adapters/adapter-1/{verb}") for verb in ("pin", "unpin", "evict")),
    ("PATCH", "/admin/tiers"),
    ("GET", "/admin/policy"),
    ("PUT", "/admin/policy"),
    ("PATCH", "/admin/policy"),
]
KIB = 1024


def names(user: User, path: str, **query: Any) -> list[str]:
    answer = user.http.get(path, params=query).raise_for_status().json()
    assert answer["object"] == "list"
    assert answer["last_id"] == (answer["data"][-1]["id"] if answer["data"] else None)
    return [adapter["name"] for adapter in answer["data"]]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_each_route_needs_an_admin_key_and_an_adapter_that_is_there(
    server: Server, user: User, method: str, path: str
) -> None:
    assert httpx.request(method, f"{server.url}{path}").json()["error"]["code"] == "missing_api_key"
    answer = user.http.request(method, path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "insufficient_permissions")
    if "adapter-1" in path:
        answer = server.admin.http.request(method, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_uses_are_counted_and_sorted_by(server: Server, user: User, adapter: PeftFiles) -> None:
    for name in ("a", "b", "c"):
        server.evict(user.import_adapter(adapter, name)["id"])
    [shown] = [a for a in user.http.get("/v1/adapters").json()["data"] if a["name"] == "a"]
    assert (shown["hits"], shown["loads"], shown["last_used_at"]) == (0, 0, None)
    for name in ("b", "b", "c"):
        user.tier(f"{user.owner}/{name}")
    found = {a["name"]: a for a in user.http.get("/v1/adapters").json()["data"]}
    assert [found[name]["hits"] for name in ("a", "b", "c")] == [0, 2, 1]
    assert [found[name]["loads"] for name in ("a", "b")] == [0, 1], "the second request found it on the device"
    assert found["b"]["last_used_at"] < found["c"]["last_used_at"]
    assert found["b"]["versions"][0]["hits"] == 2
    for path, more in (("/v1/adapters", {}), ("/admin/adapters", {"owner": user.owner})):
        asker = user if path.startswith("/v1") else server.admin
        assert names(asker, path, sort="-hits", **more) == ["b", "c", "a"]
        assert names(asker, path, sort="last_use", **more) == ["a", "b", "c"]
        assert names(asker, path, sort="-last_use", limit=2, **more) == ["c", "b"]
        assert names(asker, path, sort="-last_use", after=found["c"]["id"], **more) == ["b", "a"]


def test_a_list_is_the_same_in_however_many_pieces_it_is_written(
    server: Server, user: User, adapter: PeftFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = user.http.get("/v1/adapters").json()
    assert empty == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None, "total": 0}
    for name in ("e", "a", "b", "c", "d"):
        user.import_adapter(adapter, name)
    whole = user.http.get("/v1/adapters").json()
    assert [found["name"] for found in whole["data"]] == ["a", "b", "c", "d", "e"]
    monkeypatch.setattr(listing, "_PIECE", 2)
    assert user.http.get("/v1/adapters").json() == whole
    page = user.http.get("/v1/adapters", params={"limit": 3}).json()
    ids = [found["id"] for found in whole["data"]]
    assert page == {**whole, "data": whole["data"][:3], "has_more": True, "first_id": ids[0], "last_id": ids[2]}


def test_what_another_owner_does_with_the_same_block_is_not_ones_own_use(server: Server, adapter: PeftFiles) -> None:
    one, other = server.user(), server.user()
    one.import_adapter(adapter, "mine")
    other.import_adapter(adapter, "mine")
    one.tier(f"{one.owner}/mine")
    [theirs] = other.http.get("/v1/adapters").json()["data"]
    assert (theirs["hits"], theirs["last_used_at"]) == (0, None)


def test_lists_are_filtered_by_name_and_tier(
    server: Server, user: User, adapter: PeftFiles, other_adapter: PeftFiles
) -> None:
    for files, name in ((adapter, "here"), (other_adapter, "there")):
        server.evict(user.import_adapter(files, name)["id"])
    user.tier(f"{user.owner}/here")
    owner = {"owner": user.owner}
    assert names(server.admin, "/admin/adapters", tier="device", **owner) == ["here"]
    assert names(server.admin, "/admin/adapters", tier="disk", sort="-bytes", **owner) == ["there"]
    assert names(user, "/v1/adapters", tier="ram") == []
    assert names(user, "/v1/adapters", name="THERE") == ["there"]
    assert names(user, "/v1/adapters", pinned=True) == []


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"sort": "colour"}, "sort"),
        ({"sort": "--name"}, "sort"),
        ({"tier": "attic"}, "tier"),
        ({"pinned": "perhaps"}, "pinned"),
        ({"limit": 0}, "limit"),
        ({"limit": 100_000}, "limit"),
        ({"after": "adapter-none"}, "after"),
        ({"after": "adapter-none", "sort": "hits"}, "after"),
    ],
)
def test_a_query_that_means_nothing_is_refused_by_its_name(
    server: Server, user: User, query: dict[str, Any], param: str
) -> None:
    for asker, path in ((user, "/v1/adapters"), (server.admin, "/admin/adapters")):
        answer = asker.http.get(path, params=query)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_an_admin_deletes_anybodys_adapter(server: Server, user: User, adapter: PeftFiles) -> None:
    imported = user.import_adapter(adapter, "mine")
    path = f"/admin/adapters/{imported['id']}"
    assert server.admin.http.get(path).json()["model"] == f"{user.owner}/mine"
    assert server.admin.http.get(f"{path}/download").headers["content-type"] == "application/zip"
    assert server.admin.http.delete(path).json()["deleted"] is True
    assert names(user, "/v1/adapters") == []


# -- pins and hints


def small(base_directory: Path, tmp_path: Path, **sizes: Any) -> AbstractContextManager[Server]:
    """A server of a test's own, on whose device there is room for two of the adapters here, and no more."""
    return running(small_config(base_directory, tmp_path / "data", **{"device_bytes": 30 * KIB, **sizes}))


def tiers(server: Server) -> dict[str, Any]:
    return server.admin.http.get("/admin/tiers").raise_for_status().json()["tiers"]


def refused(answer: httpx.Response) -> tuple[int, str | None, str]:
    error = answer.json()["error"]
    return answer.status_code, error["param"], error["message"]


@pytest.fixture(scope="session")
def third_adapter(base_model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> PeftFiles:
    return PeftFiles(base_model, tmp_path_factory.mktemp("peft") / "three", seed=3)


def test_what_is_pinned_stays_on_the_device_while_others_come_and_go(
    base_directory: Path, tmp_path: Path, adapter: PeftFiles, other_adapter: PeftFiles, third_adapter: PeftFiles
) -> None:
    with small(base_directory, tmp_path) as server:
        user = server.user()
        kept, *others = [
            user.import_adapter(files, name)
            for name, files in (("kept", adapter), ("b", other_adapter), ("c", third_adapter))
        ]
        pinned = server.admin.http.post(f"/admin/adapters/{kept['id']}/pin").raise_for_status().json()
        assert (pinned["pinned"], pinned["tier"], tiers(server)["device"]["pinned"]) == ("admin", "disk", 0)
        assert names(user, "/v1/adapters", pinned=True) == ["kept"]
        for other in [{"model": kept["model"]}, *others, *others]:
            user.tier(other["model"])
        assert user.tier(kept["model"]) == "device"
        assert tiers(server)["device"]["pinned"] == 1
        for _ in range(2):
            unpinned = server.admin.http.post(f"/admin/adapters/{kept['id']}/unpin").raise_for_status().json()
            assert unpinned["pinned"] is None
        for other in others:
            user.tier(other["model"])
        assert user.tier(kept["model"]) == "disk"
        assert tiers(server)["device"]["pinned"] == 0


def test_a_pin_is_on_the_block_of_the_current_version_alone_unless_another_pin_is(
    base_directory: Path, tmp_path: Path, adapter: PeftFiles, other_adapter: PeftFiles
) -> None:
    with small(base_directory, tmp_path, device_bytes=512 * KIB) as server:
        user = server.user()
        mine, same = (user.import_adapter(adapter, name) for name in ("mine", "same"))
        for imported in (mine, same):
            user.http.post(f"/v1/adapters/{imported['id']}/pin").raise_for_status()
        user.tier(mine["model"])
        pinned = lambda: tiers(server)["device"]["pinned"]  # noqa: E731
        assert pinned() == 1, "two pins of the same block"
        user.import_adapter(other_adapter, "mine")
        assert pinned() == 1, "the other one still has it"
        user.import_adapter(other_adapter, "same")
        assert pinned() == 0, "it is no adapter's current version, and the new one was not asked for yet"
        user.tier(mine["model"])
        assert pinned() == 1
        newest = user.http.get(f"/v1/adapters/{mine['id']}").json()["versions"][0]["model"]
        user.http.delete(f"/v1/adapters/{same['id']}").raise_for_status()
        assert user.tier(mine["model"]) == "disk", "a deleted adapter's block leaves"
        user.tier(user.http.get(f"/v1/adapters/{mine['id']}").json()["versions"][1]["model"])
        assert pinned() == 1
        user.http.delete(f"/v1/models/{newest}").raise_for_status()
        assert pinned() == 1, "the version before is the current one again"
        user.http.post(f"/v1/adapters/{mine['id']}/unpin").raise_for_status()
        assert pinned() == 0


def test_a_pin_goes_over_to_what_a_job_trains(server: Server, user: User, adapter: PeftFiles) -> None:
    imported = user.import_adapter(adapter, "mine")
    user.http.post(f"/v1/adapters/{imported['id']}/pin").raise_for_status()
    before = tiers(server)["device"]["pinned"]
    user.tier(imported["model"])
    assert tiers(server)["device"]["pinned"] == before + 1
    user.job(user.train(chat_lines(), suffix="mine", max_steps=1), "succeeded")
    user.tier(imported["model"])
    assert tiers(server)["device"]["pinned"] == before + 1
    user.http.delete(f"/v1/adapters/{imported['id']}").raise_for_status()
    assert tiers(server)["device"]["pinned"] == before


def test_pins_are_bounded_for_each_owner_and_for_all(
    base_directory: Path, tmp_path: Path, adapter: PeftFiles, other_adapter: PeftFiles, third_adapter: PeftFiles
) -> None:
    with small(base_directory, tmp_path, device_bytes=256 * KIB) as server:
        user = server.user()
        one, other, third = [
            user.import_adapter(files, name)["id"]
            for name, files in (("one", adapter), ("other", other_adapter), ("third", third_adapter))
        ]
        for _ in range(2):
            user.http.post(f"/v1/adapters/{one}/pin").raise_for_status()
        status, param, message = refused(user.http.post(f"/v1/adapters/{other}/pin"))
        assert (status, param) == (400, "id")
        assert "your pins would hold 25." in message
        assert "an owner's may hold 16.0 KiB, 1/16 of the device's 256.0 KiB" in message
        assert names(user, "/v1/adapters", pinned=True) == ["one"]
        server.admin.http.post(f"/admin/adapters/{other}/pin").raise_for_status()
        server.admin.http.patch("/admin/tiers", json={"device_bytes": 40 * KIB}).raise_for_status()
        status, param, message = refused(server.admin.http.post(f"/admin/adapters/{third}/pin"))
        assert (status, param) == (400, "id")
        assert "all owners' pins together would hold 40." in message
        assert "all may hold 30.0 KiB, 3/4 of the device's 40.0 KiB" in message


def test_an_owner_cannot_undo_the_operators_pin(server: Server, user: User, adapter: PeftFiles) -> None:
    path = f"/adapters/{user.import_adapter(adapter, 'mine')['id']}"
    assert user.http.post(f"/v1{path}/pin").json()["pinned"] == "owner"
    assert server.admin.http.post(f"/admin{path}/pin").json()["pinned"] == "admin"
    assert user.http.post(f"/v1{path}/pin").json()["pinned"] == "admin"
    assert refused(user.http.post(f"/v1{path}/unpin"))[0] == 403
    assert server.admin.http.post(f"/admin{path}/unpin").json()["pinned"] is None


def test_a_hint_brings_an_adapter_to_the_device(server: Server, user: User, adapter: PeftFiles) -> None:
    imported = user.import_adapter(adapter, "mine")
    server.evict(imported["id"])
    answer = user.http.post(f"/v1/adapters/{imported['id']}/prefetch")
    assert (answer.status_code, answer.json()["id"]) == (202, imported["id"])
    eventually(lambda: user.http.get(f"/v1/adapters/{imported['id']}").json()["tier"] == "device")
    assert user.tier(imported["model"]) == "device"


def test_what_a_job_publishes_comes_to_the_device_before_it_is_asked_for(server: Server, user: User) -> None:
    user.job(user.train(chat_lines(), suffix="mine", max_steps=1), "succeeded")
    eventually(lambda: names(user, "/v1/adapters", tier="device") == ["mine"])
    assert user.tier(f"{user.owner}/mine") == "device"


def test_what_an_owner_used_last_comes_to_the_device_when_their_key_is_seen_after_a_pause(
    server: Server, user: User, adapter: PeftFiles, other_adapter: PeftFiles, third_adapter: PeftFiles, monkeypatch: Any
) -> None:
    other, mine = user.import_adapter(other_adapter, "other"), user.import_adapter(adapter, "mine")
    for imported in (other, mine):
        user.tier(imported["model"])
        server.evict(imported["id"])
    newest = user.import_adapter(third_adapter, "mine")["current"]

    def on_device() -> list[str]:
        """The versions that are there, or on their way; what was hinted at has had its turn."""
        server.hub.engine.check_integrity().result(SECONDS)
        tiers = server.hub.engine.engines[0].tiers
        server.hub.engine.check_integrity().result(SECONDS)
        return [v.id for v in server.hub.registry.versions(user.owner) if tiers.nearest(v.digest) is not None]

    def come_back(hours: int) -> None:
        monkeypatch.setattr(keys, "now", lambda: now() + hours * 3600)
        user.openai.models.list()

    come_back(0)
    assert on_device() == [], "there was no pause"
    come_back(1)
    assert on_device() == [newest], "what the name of what was used last means by now"
    assert user.tier(mine["model"]) == "device"
    user.http.delete(f"/v1/adapters/{mine['id']}").raise_for_status()
    come_back(2)
    assert on_device() == [], "what is no more is not looked for"


@pytest.mark.parametrize("verb", ["pin", "unpin", "prefetch"])
def test_owners_steer_their_own_adapters_alone(server: Server, user: User, adapter: PeftFiles, verb: str) -> None:
    path = f"/v1/adapters/{user.import_adapter(adapter, 'mine')['id']}/{verb}"
    assert httpx.post(f"{server.url}{path}").json()["error"]["code"] == "missing_api_key"
    assert server.user().http.post(path).status_code == 404


def test_evict_takes_an_adapter_out_of_the_tier_that_is_named(
    base_directory: Path, tmp_path: Path, adapter: PeftFiles
) -> None:
    with small(base_directory, tmp_path, ram_bytes=100 * KIB) as server:
        user = server.user()
        imported = user.import_adapter(adapter, "mine")
        path = f"/admin/adapters/{imported['id']}/evict"
        user.tier(imported["model"])
        for body, found in (
            ({"tier": "device"}, "ram"),
            ({"tier": "ram"}, "device"),
            ({"tier": "device"}, "disk"),
            ({}, "disk"),
            (None, "disk"),
        ):
            assert server.admin.http.post(path, json=body).json()["evicted"] is True
            assert user.tier(imported["model"]) == found, body
        for wrong, param in (({"tier": "disk"}, "tier"), ({"tier": "remote"}, "tier"), ({"tiers": "ram"}, "tiers")):
            assert refused(server.admin.http.post(path, json=wrong))[:2] == (400, param)
        assert user.tier(imported["model"]) == "device", "nothing else has it"


def test_a_file_is_evicted_from_a_disk_that_is_a_cache_and_fetched_again(
    base_directory: Path, tmp_path: Path, adapter: PeftFiles
) -> None:
    with small(base_directory, tmp_path, store=f"file://{tmp_path}/store") as server:
        user = server.user()
        imported = user.import_adapter(adapter, "mine")
        digest = imported["versions"][0]["digest"]
        path = f"/admin/adapters/{imported['id']}/evict"
        from_disk = lambda: server.admin.http.post(path, json={"tier": "disk"}).raise_for_status().json()  # noqa: E731
        with server.hub.disk.holding(digest):
            assert (from_disk()["evicted"], from_disk()["in_use"]) == (False, 1)
        for _ in range(2):
            assert (from_disk()["evicted"], from_disk()["in_use"]) == (True, 0)
        assert names(user, "/v1/adapters", tier="remote") == ["mine"]
        assert user.tier(imported["model"]) == "remote"
        assert user.tier(imported["model"]) == "device"
        from_disk()
        assert user.tier(imported["model"]) == "device", "what is in memory stays there"
        assert tiers(server)["disk"]["adapters"] == 0


# -- budgets and rules


def test_budgets_change_at_once_and_are_there_after_a_restart_unless_others_are_given(
    base_directory: Path, tmp_path: Path, adapter: PeftFiles, other_adapter: PeftFiles
) -> None:
    with small(base_directory, tmp_path) as server:
        user = server.user()
        for name, files in (("a", adapter), ("b", other_adapter)):
            user.tier(user.import_adapter(files, name)["model"])
        assert tiers(server)["device"]["adapters"] == 2
        asked = {"device_bytes": 16 * KIB, "ram_bytes": 64 * KIB, "disk_bytes": 100 * KIB}
        shown = server.admin.http.patch("/admin/tiers", json=asked).raise_for_status().json()["tiers"]
        assert shown == tiers(server)
        assert {f"{tier}_bytes": shown[tier]["budget_bytes"] for tier in ("device", "ram", "disk")} == asked
        assert shown["device"]["adapters"] == 1
        assert user.tier(f"{user.owner}/a") == "disk"
        for i in range(20):
            answer = user.http.post("/v1/adapters", data={"name": f"n{i}"}, files=adapter.upload)
            assert answer.status_code == 200, "the same block takes no more room"
    saved = {"device_bytes": None, "ram_bytes": None, "disk_bytes": None}
    for given, found in ((saved, asked), ({**saved, "ram_bytes": 0}, {**asked, "ram_bytes": 0}), (saved, asked)):
        with small(base_directory, tmp_path, **given) as server:
            shown = tiers(server)
            assert {f"{tier}_bytes": shown[tier]["budget_bytes"] for tier in ("device", "ram", "disk")} == found


def test_a_budget_that_cannot_be_is_refused_and_nothing_changes(
    base_directory: Path, tmp_path: Path, adapter: PeftFiles
) -> None:
    with small(base_directory, tmp_path) as server:
        user = server.user()
        imported = user.import_adapter(adapter, "mine")
        server.admin.http.post(f"/admin/adapters/{imported['id']}/pin").raise_for_status()
        user.tier(imported["model"])
        before = tiers(server)
        for body, param, message in (
            ({}, None, "at least one of device_bytes, ram_bytes, disk_bytes"),
            ({"device_bytes": -1}, "device_bytes", "greater than or equal to 0"),
            ({"ram_bytes": "1GiB"}, "ram_bytes", "valid integer"),
            ({"disk_bytes": 1.5}, "disk_bytes", "valid integer"),
            ({"ram_bytes": 2**60}, "ram_bytes", "less than or equal to"),
            ({"pool": 1}, "pool", "not permitted"),
            ({"device_bytes": 2**50, "disk_bytes": 100 * KIB}, None, "A pool of 1024.0 TiB"),
            ({"device_bytes": 10 * KIB, "disk_bytes": 100 * KIB}, None, "pinned or in use would not fit"),
            ({"device_bytes": 100 * KIB, "disk_bytes": KIB}, None, "do not fit into 1.0 KiB"),
        ):
            status, named, said = refused(server.admin.http.patch("/admin/tiers", json=body))
            assert (status, named) == (400, param)
            assert message in said
        assert tiers(server)["device"] == before["device"]
        assert tiers(server)["ram"] == before["ram"]
        assert tiers(server)["disk"]["budget_bytes"] == before["disk"]["budget_bytes"]


def test_rules_are_tried_before_they_are_set_and_are_there_after_a_restart(
    base_directory: Path, tmp_path: Path, adapter: PeftFiles, other_adapter: PeftFiles
) -> None:
    with small(base_directory, tmp_path) as server:
        user, http = server.user(), server.admin.http
        for name, files in (("a", adapter), ("b", other_adapter)):
            user.tier(user.import_adapter(files, name)["model"])
        first = http.get("/admin/policy").raise_for_status().json()
        unset = {"policy": "lru", "ttl_seconds": None, "owners": {}}
        assert first == {"device": unset, "ram": unset, "disk": unset}
        rule = {"floor_bytes": 0, "ceiling_bytes": 12 * KIB, "priority": 0}
        changes = {"device": {"policy": "sieve", "owners": {user.owner: rule}}, "disk": {"ttl_seconds": 60}}
        plan = http.put("/admin/policy", json=changes, params={"dry_run": True}).raise_for_status().json()
        [gone] = plan["device"]
        assert (gone["models"], plan["ram"]) == ([f"{user.owner}/a"], [])
        assert http.get("/admin/policy").json() == first
        assert tiers(server)["device"]["adapters"] == 2
        rules = http.put("/admin/policy", json=changes).raise_for_status().json()
        assert rules == plan["rules"] == http.get("/admin/policy").json()
        assert rules["device"] == {"policy": "sieve", "ttl_seconds": None, "owners": {user.owner: rule}}
        assert tiers(server)["device"]["adapters"] == 1
        assert user.tier(f"{user.owner}/b") == "device"
        http.put("/admin/policy", json={"device": {"ttl_seconds": 1e-9}}).raise_for_status()
        assert tiers(server)["device"]["adapters"] == 0, "unused for too long"
        rules["device"]["ttl_seconds"] = 1e-9
    with small(base_directory, tmp_path) as server:
        assert server.admin.http.get("/admin/policy").json() == rules
        user = server.as_user(user.owner, server.hub.keys.create(user.owner))
        assert user.tier(f"{user.owner}/a") == "disk"
        eventually(lambda: tiers(server)["device"]["adapters"] == 0)


@pytest.mark.parametrize("query", [{}, {"dry_run": True}])
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ([], "rules"),
        ({"attic": {}}, "rules"),
        ({"device": {"colour": 1}}, "device"),
        ({"device": {"policy": "fifo"}}, "device.policy"),
        ({"ram": {"ttl_seconds": 0}}, "ram.ttl_seconds"),
        ({"disk": {"owners": {"ada": {"floor_bytes": -1}}}}, "disk.owners.ada.floor_bytes"),
        ({"disk": {"owners": {"ada": {"floor_bytes": 2, "ceiling_bytes": 1}}}}, "disk.owners.ada.ceiling_bytes"),
        ({"disk": {"owners": {"ada": {"priority": 3}}}}, "disk.owners.ada.priority"),
    ],
)
def test_rules_that_mean_nothing_are_refused_by_their_name(
    server: Server, body: Any, param: str, query: dict[str, Any]
) -> None:
    before = server.admin.http.get("/admin/policy").json()
    assert refused(server.admin.http.put("/admin/policy", json=body, params=query))[:2] == (400, param)
    assert server.admin.http.get("/admin/policy").json() == before


def test_tiers_shows_each_tier_and_the_store_where_there_is_one(
    base_directory: Path, tmp_path: Path, server: Server, adapter: PeftFiles
) -> None:
    assert set(tiers(server)) == {"device", "ram", "disk"}
    url = f"file://{tmp_path}/store"
    with small(base_directory, tmp_path, store=url) as stored:
        user = stored.user()
        user.tier(user.import_adapter(adapter, "mine")["model"])
        shown = tiers(stored)
    loads = shown["device"]["load_ms"]
    assert loads["ram"] is loads["remote"] is None
    assert 0 < loads["disk"]["p50"] <= loads["disk"]["p99"]
    assert shown["store"]["url"] == url
    assert (shown["disk"]["adapters"], shown["disk"]["loads"], shown["store"]["loads"]) == (1, 1, 0)
    for tier in ("device", "ram", "disk"):
        assert {"budget_bytes", "used_bytes", "adapters", "pinned", "hits", "hit_ratio", "evictions", "loads"} <= set(
            shown[tier]
        )
