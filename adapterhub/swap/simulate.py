"""What a trace would have met under other budgets and rules: replayed over the very `Residency` that serves.

Each use is taken as one instant: what it needs is there at once, and it is over before the next begins. So nothing is
ever on its way or in use when room is made, and nothing is read ahead; pins are not in a trace, and play no part.
Nor is the device that a use was on: what several devices served is replayed as the use of one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from adapterhub.config import format_bytes
from adapterhub.errors import BadRequest
from adapterhub.swap.allocator import aligned
from adapterhub.swap.frames import Trace
from adapterhub.swap.policies import Policy, Rules
from adapterhub.swap.ref import Tier
from adapterhub.swap.residency import Residency, item_of

DEVICE_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4)  # of the bytes of all blocks that a trace uses
RAM_SHARE = 1 / 4


class Budgets(NamedTuple):
    """In bytes."""

    device: int
    ram: int


@dataclass(frozen=True)
class Outcome:
    """Counts of one replay. A use is a hit where its adapter was found, else a cold boot: read from disk or store."""

    uses: int
    device_hits: int
    ram_hits: int
    read_bytes: int  # by cold boots
    device_evictions: int
    ram_evictions: int

    @property
    def loads(self) -> int:
        """Onto the device, from wherever."""
        return self.uses - self.device_hits

    @property
    def cold_boots(self) -> int:
        return self.loads - self.ram_hits

    @property
    def hit_ratio(self) -> float:
        """Of the device."""
        return self.device_hits / self.uses

    @property
    def cold_boots_per_1000(self) -> float:
        return 1000 * self.cold_boots / self.uses


@dataclass(frozen=True)
class Setting:
    """One policy for the device and for RAM, with whatever else an operator has set for them."""

    budgets: Budgets
    policy: Policy
    others: Rules = field(default_factory=Rules)

    @property
    def rules(self) -> Rules:
        device, ram = (replace(rules, policy=self.policy) for rules in (self.others.device, self.others.ram))
        return Rules(device, ram)


class Result(NamedTuple):
    setting: Setting
    outcome: Outcome


def simulate(trace: Trace, budgets: Budgets, rules: Rules) -> Outcome:
    """Replays all of `trace`. Raises BadRequest when it is empty, or one of its adapters alone is over the device's
    budget."""
    _check(trace, budgets)
    residency = Residency(*budgets, rules)
    items = [item_of(adapter.digest, adapter.nbytes, adapter.owner) for adapter in trace.adapters]
    expires = rules.device.ttl_seconds is not None or rules.ram.ttl_seconds is not None
    device_hits = ram_hits = read_bytes = device_evictions = ram_evictions = 0
    for now, index in zip(trace.time.tolist(), trace.adapter.tolist(), strict=True):
        if expires:
            gone = residency.expire(now)
            device_evictions += len(gone.device)
            ram_evictions += len(gone.ram)
        item = items[index]
        found = residency.find(item.key)
        if found is Tier.DEVICE:
            device_hits += 1
            residency.hold(item.key, now)
        else:
            admission = residency.admit(item, now)
            assert admission is not None, "there is room for every block while none is in use"
            device_evictions += len(admission.evicted)
            if found is Tier.RAM:
                ram_hits += 1
                residency.ram.touch(item.key, now)
            residency.hold(item.key, now)
            residency.arrived(item.key)
            if found is None:
                read_bytes += item.size
                kept = residency.keep(item, now)
                ram_evictions += len(kept.evicted) if kept else 0
        residency.release(item.key, now)
    return Outcome(len(trace), device_hits, ram_hits, read_bytes, device_evictions, ram_evictions)


def sweep(trace: Trace, settings: Sequence[Setting]) -> Iterator[Result]:
    """One replay after the other. Raises BadRequest before the first, as `simulate` does."""
    for budgets in {setting.budgets for setting in settings}:
        _check(trace, budgets)
    return (Result(setting, simulate(trace, setting.budgets, setting.rules)) for setting in settings)


def best(results: Collection[Result]) -> dict[Budgets, Setting]:
    """For each pair of budgets the setting with the fewest cold boots, then with the most hits on the device."""
    chosen: dict[Budgets, Result] = {}
    for result in results:
        before = chosen.setdefault(result.setting.budgets, result)
        if _merit(result.outcome) > _merit(before.outcome):
            chosen[result.setting.budgets] = result
    return {budgets: result.setting for budgets, result in chosen.items()}


def blocks(trace: Trace) -> dict[str, int]:
    """The blocks that a trace uses, by digest, and the bytes that each takes of a device."""
    used = (trace.adapters[index] for index in np.unique(trace.adapter).tolist())
    return {adapter.digest: aligned(adapter.nbytes) for adapter in used}


def share_budgets(trace: Trace, shares: Sequence[float]) -> list[int]:
    """Budgets that hold these shares of the bytes of a trace's blocks, and the largest of them at least; each once."""
    sizes = blocks(trace).values()
    return list(dict.fromkeys(max(math.ceil(share * sum(sizes)), *sizes) for share in shares))


def _merit(outcome: Outcome) -> tuple[int, int]:
    return -outcome.cold_boots, outcome.device_hits


def _check(trace: Trace, budgets: Budgets) -> None:
    if not len(trace):
        raise BadRequest("The trace is empty: there is nothing to replay.")
    largest = max(blocks(trace).values())
    if budgets.device < largest:
        raise BadRequest(
            f"A device budget of {format_bytes(budgets.device)} ({budgets.device} bytes) does not hold the largest "
            f"adapter of the trace, which has {format_bytes(largest)}. Choose at least {largest} bytes."
        )
    if budgets.ram < 0:
        raise BadRequest(f"A RAM budget of {budgets.ram} bytes is below 0. Choose 0 for no RAM tier.")
