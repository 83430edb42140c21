"""What an operator has set on a running server, kept for its next start: rules and budgets."""

from __future__ import annotations

import json
from typing import Any

import sqlite_utils
from sqlite_utils import Migrations

from adapterhub.swap.database import Database
from adapterhub.swap.policies import Rules

migrations = Migrations("adapterhub.settings")


@migrations()
def create_settings(db: sqlite_utils.Database) -> None:
    db.execute("create table settings (key text primary key, value text not null)")


class Settings:
    """Safe to use from any thread."""

    def __init__(self, database: Database) -> None:
        database.migrate(migrations)
        self._database = database

    def rules(self) -> Rules:
        return Rules().merged(self._get("rules", {}))

    def save_rules(self, rules: Rules) -> None:
        self._put("rules", rules.json)

    def budgets(self) -> dict[str, int]:
        """Bytes by tier, "device", "ram" or "disk": of those that were set live."""
        return self._get("budgets", {})

    def save_budgets(self, **budgets: int) -> None:
        """The others stay as they were."""
        self._put("budgets", self.budgets() | budgets)

    def _get(self, key: str, default: Any) -> Any:
        row = self._database.row("select value from settings where key = ?", (key,))
        return default if row is None else json.loads(row["value"])

    def _put(self, key: str, value: Any) -> None:
        with self._database.transaction() as db:
            db.table("settings").upsert({"key": key, "value": json.dumps(value)}, pk="key")
