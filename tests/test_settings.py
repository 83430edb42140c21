"""What was set live is there after a restart."""

from __future__ import annotations

from pathlib import Path

from adapterhub.swap.database import Database
from adapterhub.swap.policies import OwnerRule, Policy, Rules, TierRules
from adapterhub.swap.settings import Settings


def test_rules_and_budgets_are_there_at_the_next_start(tmp_path: Path) -> None:
    rules = Rules(device=TierRules(Policy.SIEVE, 60.0, {"ada": OwnerRule(1, 2, 0)}))
    database = Database(tmp_path / "hub.db")
    settings = Settings(database)
    assert (settings.rules(), settings.budgets()) == (Rules(), {})
    settings.save_rules(Rules())
    settings.save_rules(rules)
    settings.save_budgets(device=5, ram=6)
    settings.save_budgets(ram=7)
    database.close()
    again = Database(tmp_path / "hub.db")
    assert Settings(again).rules() == rules
    assert Settings(again).budgets() == {"device": 5, "ram": 7}
    again.close()
