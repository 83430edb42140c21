"""`/admin/adapters` and the lists of `/v1/adapters`: what they filter, sort and show, and to whom."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.serving import PeftFiles, Server, User

ROUTES = [
    ("GET", "/admin/tiers"),
    ("GET", "/admin/adapters"),
    ("GET", "/admin/adapters/adapter-1"),
    ("GET", "/admin/adapters/adapter-1/download"),
    ("DELETE", "/admin/adapters/adapter-1"),
    ("POST", "/admin/adapters/adapter-1/evict"),
]


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
