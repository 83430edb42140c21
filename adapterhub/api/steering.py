"""What an operator changes on a running server, budgets and rules: put into force, and kept for the next start."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import NamedTuple

from adapterhub.base.fleet import Fleet
from adapterhub.config import Config
from adapterhub.swap.disk import DiskTier
from adapterhub.swap.policies import Rules
from adapterhub.swap.settings import Settings


def with_saved(config: Config, settings: Settings) -> Config:
    """A configuration with the budgets that were set live in place of those that it does not give."""
    saved = settings.budgets()

    def chosen(given: int | None, tier: str) -> int | None:
        return saved.get(tier) if given is None else given

    return dataclasses.replace(
        config,
        device_bytes=chosen(config.device_bytes, "device"),
        ram_bytes=chosen(config.ram_bytes, "ram"),
        disk_bytes=chosen(config.disk_bytes, "disk"),
    )


class Trial(NamedTuple):
    """Other rules, and what would leave each tier for them now: digests and bytes."""

    rules: Rules
    device: list[tuple[str, int]]
    ram: list[tuple[str, int]]
    disk: list[tuple[str, int]]


class Steering:
    """Safe to use from any thread but the engines', for which it waits."""

    def __init__(self, engine: Fleet, disk: DiskTier, settings: Settings) -> None:
        self._engine = engine
        self._disk = disk
        self._settings = settings
        self._changing = threading.Lock()  # what is in force is what was saved last

    @property
    def rules(self) -> Rules:
        return self._settings.rules()

    def set_budgets(self, device: int | None, ram: int | None, disk: int | None) -> None:
        """Bytes, of device and RAM for each device; None leaves one as it is. What no longer fits is evicted.

        Raises BadRequest, and changes nothing, when what must stay would not fit; StorageFull when it cannot be saved.
        """
        with self._changing:
            self._engine.plan(device=device, ram=ram).result()  # before anything is changed
            if disk is not None:
                self._disk.files.over(disk)
            given = {tier: budget for tier, budget in (("device", device), ("ram", ram)) if budget is not None}
            if given:
                with self._settings.saving_budgets(**given):
                    self._engine.set_budgets(**given).result()
            if disk is not None:
                with self._settings.saving_budgets(disk=disk):
                    self._disk.set_budget(disk)

    def try_rules(self, change: Callable[[Rules], Rules]) -> Trial:
        """What `set_rules` would do now. Raises BadRequest."""
        rules = change(self.rules)
        plan = self._engine.plan(rules).result()
        return Trial(rules, plan.device, plan.ram, self._disk.plan(rules.disk))

    def set_rules(self, change: Callable[[Rules], Rules]) -> Rules:
        """Puts what `change` makes of the rules that are in force into their place; of two changes at once none is
        lost. Raises BadRequest, and StorageFull, and changes nothing, when they cannot be saved."""
        with self._changing:
            rules = change(self.rules)
            with self._settings.saving_rules(rules):
                self._engine.set_rules(rules).result()
                self._disk.set_rules(rules.disk)
            return rules
