"""Rules that operators change on a running server: one owner's alone, several at once, tried on the disk, too. And
which policy is best when."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from adapterhub.errors import BadRequest
from adapterhub.swap.policies import OwnerRule, Policy, Rules, TierRules
from tests.serving import PeftFiles, Server, run_cli, running, small_config
from tests.test_simulate import SIZE, outcomes, trace_of

BEFORE = Rules(device=TierRules(Policy.GDSF, 60.0, {"ada": OwnerRule(1, 20, 2), "bob": OwnerRule(3)}))


@pytest.mark.parametrize(
    ("owners", "after"),
    [
        ({"ada": {"floor_bytes": 5}}, {"ada": OwnerRule(5, 20, 2), "bob": OwnerRule(3)}),
        ({"ada": {"ceiling_bytes": None}}, {"ada": OwnerRule(1, None, 2), "bob": OwnerRule(3)}),
        ({"ada": {}}, BEFORE.device.owners),
        ({"ada": None, "eve": None}, {"bob": OwnerRule(3)}),
        ({"*": {"priority": 0}, "bob": None}, {"ada": OwnerRule(1, 20, 2), "*": OwnerRule(priority=0)}),
    ],
)
def test_a_patch_changes_what_it_names_of_the_owners_it_names(owners: Any, after: Any) -> None:
    rules = BEFORE.patched({"device": {"owners": owners}})
    assert rules == Rules(device=TierRules(Policy.GDSF, 60.0, after))
    assert BEFORE.patched({}) == BEFORE
    assert BEFORE.merged({"device": {"owners": {}}}).device.owners == {}, "a whole set of owners is one that is set"


@pytest.mark.parametrize(
    ("rule", "param"),
    [
        ([], "device.owners.ada"),
        ({"colour": 1}, "device.owners.ada"),
        ({"floor_bytes": 21}, "device.owners.ada.ceiling_bytes"),
    ],
)
def test_a_patch_that_means_nothing_is_refused_by_its_name(rule: Any, param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        BEFORE.patched({"device": {"owners": {"ada": rule}}})
    assert refused.value.param == param


def test_rules_of_many_owners_set_at_once_are_all_there(server: Server) -> None:
    def set_rule(number: int) -> None:
        body = {"device": {"owners": {f"many-{number}": {"floor_bytes": number}}}}
        server.admin.http.patch("/admin/policy", json=body).raise_for_status()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(set_rule, range(40)))
    owners = server.admin.http.get("/admin/policy").json()["device"]["owners"]
    assert {name: rule["floor_bytes"] for name, rule in owners.items() if "many-" in name} == {
        f"many-{number}": number for number in range(40)
    }
    forget = {"device": {"owners": dict.fromkeys(owners)}}
    assert server.admin.http.patch("/admin/policy", json=forget).json()["device"]["owners"] == {}


def test_a_dry_run_says_what_would_leave_the_disk(
    base_directory: Path, tmp_path: Path, adapter: PeftFiles, other_adapter: PeftFiles
) -> None:
    with running(small_config(base_directory, tmp_path / "data", store=f"file://{tmp_path}/store")) as server:
        user = server.user()
        for name, files in (("a", adapter), ("b", other_adapter)):
            user.import_adapter(files, name)
        files = sorted((tmp_path / "data" / "blobs").iterdir())
        changes = ("--tier", "disk", "--owner", user.owner, "--ceiling", "1K")
        said = run_cli("policy", "set", *changes, "--dry-run", user=server.admin)
        size = sum(path.stat().st_size for path in files)
        assert f"and the disk: 2 ({size / 1024:.1f} KiB). Nothing was changed." in said.stdout.replace("\n", " ")
        tried = run_cli("policy", "set", *changes, "--dry-run", "--json", user=server.admin)
        plan = json.loads(tried.stdout)
        assert (plan["device"], plan["ram"]) == ([], [])
        assert {tuple(gone["models"]) for gone in plan["disk"]} == {(f"{user.owner}/a",), (f"{user.owner}/b",)}
        assert sorted((tmp_path / "data" / "blobs").iterdir()) == files
        assert run_cli("policy", "set", *changes, user=server.admin).returncode == 0
        assert list((tmp_path / "data" / "blobs").iterdir()) == []
        assert user.ask(f"{user.owner}/a")


def test_options_may_stand_before_set_as_well_as_after_it(server: Server) -> None:
    account = ("--url", server.url, "--api-key", server.admin.key)
    budget = str(server.hub.engine.stats().result()["tiers"]["device"]["budget_bytes"])
    for before, after in (((*account, "--json"), ()), ((), (*account, "--json")), (("--json",), account)):
        said = run_cli("tiers", *before, "set", "--device", budget, *after)
        assert said.returncode == 0, said.stderr
        assert json.loads(said.stdout)["tiers"]["device"]["budget_bytes"] == int(budget)
    wrong = run_cli("tiers", "--url", "http://127.0.0.1:1", "set", "--device", budget, *account)
    assert wrong.returncode == 0, "what stands after it counts"


# -- which policy when


def test_where_users_come_and_leave_lru_has_the_fewest_cold_boots() -> None:
    """24 owners at a time, who ask about 20 times each and never come back: what was used often is of no use any more,
    and policies that count hold on to it."""
    choose, here, picks = random.Random(0), dict[int, int](), list[int]()
    for owner in range(400):
        here[owner] = choose.randint(10, 30)
        while len(here) == 24 or (owner == 399 and here):
            asks = choose.choice(list(here))
            picks.append(asks)
            here[asks] -= 1
            if here[asks] == 0:
                del here[asks]
    cold = {policy: found.cold_boots for policy, found in outcomes(trace_of(picks), 30 * SIZE, 0).items()}
    assert min(cold, key=cold.__getitem__) is Policy.LRU
    assert cold[Policy.LRU] < 0.8 * cold[Policy.SIEVE]
    assert cold[Policy.LRU] < 0.3 * cold[Policy.GDSF]
