"""What an operator has set on a running server, kept for its next start: rules and budgets.

It is saved before it is put into force: what cannot be saved never is, and what is in force is there after a restart.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlite_utils
from sqlite_utils import Migrations

from adapterhub.swap.database import Database
from adapterhub.swap.policies import Rules

log = logging.getLogger(__name__)
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

    @contextmanager
    def saving_rules(self, rules: Rules) -> Iterator[None]:
        """Within this block, whoever saves them puts them into force; if that fails, they are not saved any more.

        Raises StorageFull.
        """
        with self._saving("rules", rules.json):
            yield

    def budgets(self) -> dict[str, int]:
        """Bytes by tier, "device", "ram" or "disk": of those that were set live."""
        return self._get("budgets", {})

    @contextmanager
    def saving_budgets(self, **budgets: int) -> Iterator[None]:
        """As `saving_rules`; the others stay as they were."""
        with self._saving("budgets", self.budgets() | budgets):
            yield

    def _get(self, key: str, default: Any) -> Any:
        row = self._database.row("select value from settings where key = ?", (key,))
        return default if row is None else json.loads(row["value"])

    @contextmanager
    def _saving(self, key: str, value: Any) -> Iterator[None]:
        before = self._get(key, None)
        self._put(key, value)
        try:
            yield
        except BaseException:
            try:
                self._put(key, before)
            except Exception:  # the error that is under way says more
                log.exception("the %s that were refused just now are those of the next start", key)
            raise

    def _put(self, key: str, value: Any) -> None:
        """None: as if nothing had ever been saved."""
        with self._database.transaction() as db:
            if value is None:
                db.execute("delete from settings where key = ?", (key,))
            else:
                db.table("settings").upsert({"key": key, "value": json.dumps(value)}, pk="key")
