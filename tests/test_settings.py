"""What was set live is there after a restart, and what could not be set, or not be saved, is not in force."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from adapterhub.errors import BadRequest
from adapterhub.swap.database import Database
from adapterhub.swap.policies import OwnerRule, Policy, Rules, TierRules
from adapterhub.swap.settings import Settings
from tests.serving import Server


def test_rules_and_budgets_are_there_at_the_next_start(tmp_path: Path) -> None:
    rules = Rules(device=TierRules(Policy.SIEVE, 60.0, {"ada": OwnerRule(1, 2, 0)}))
    database = Database(tmp_path / "hub.db")
    settings = Settings(database)
    assert (settings.rules(), settings.budgets()) == (Rules(), {})
    for saved in (Rules(), rules):
        with settings.saving_rules(saved):
            pass
    for budgets in ({"device": 5, "ram": 6}, {"ram": 7}):
        with settings.saving_budgets(**budgets):
            pass
    database.close()
    again = Database(tmp_path / "hub.db")
    assert Settings(again).rules() == rules
    assert Settings(again).budgets() == {"device": 5, "ram": 7}
    again.close()


@pytest.mark.parametrize("before", [None, {"device": 5}])
def test_what_cannot_be_put_into_force_is_not_saved(tmp_path: Path, before: dict[str, int] | None) -> None:
    settings = Settings(Database(tmp_path / "hub.db"))
    if before:
        with settings.saving_budgets(**before):
            pass

    def apply() -> None:
        with settings.saving_budgets(device=7, ram=8):
            assert settings.budgets() == {"device": 7, "ram": 8}
            raise BadRequest("no room")

    with pytest.raises(BadRequest):
        apply()
    assert settings.budgets() == (before or {})


def test_what_cannot_be_saved_is_not_in_force(server: Server) -> None:
    def state() -> tuple[object, ...]:
        tiers = server.admin.http.get("/admin/tiers").json()
        budgets = [tiers["tiers"][tier]["budget_bytes"] for tier in ("device", "ram", "disk")]
        rules = [engine.tiers.contents.residency.rules for engine in server.hub.engine.engines]
        return budgets, rules, server.hub.steering.rules

    before = state()
    other = sqlite3.connect(server.hub.config.database)
    for what in ("insert", "update"):
        other.execute(f"create trigger no_{what} before {what} on settings begin select raise(abort, 'no'); end")
    other.commit()
    try:
        for path, body in (
            ("tiers", {"device_bytes": 4 * 2**20}),
            ("tiers", {"disk_bytes": 2**30}),
            ("policy", {"device": {"policy": "gdsf"}, "disk": {"policy": "gdsf"}}),
        ):
            assert server.admin.http.patch(f"/admin/{path}", json=body).status_code == 500
            assert state() == before
    finally:
        for what in ("insert", "update"):
            other.execute(f"drop trigger no_{what}")
        other.commit()
        other.close()
