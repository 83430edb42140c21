"""Deciding what goes: a use, and every other time an eviction and a load, with 100 and with 10,000 adapters of owners
with a floor each."""

from __future__ import annotations

import random
import statistics
import time

from figure import Figure

from adapterhub.swap.policies import Item, Keeper, OwnerRule, Policy, TierRules
from benchmarks.peers import Setting

COUNTS = (100, 10_000)
DECISIONS, RUNS = 20_000, 5


def run(_: Setting) -> list[Figure]:
    figures = []
    for policy in Policy:
        few, many = ([_microseconds(policy, count, run) for run in range(RUNS)] for count in COUNTS)
        ratio = f"{statistics.median(many) / statistics.median(few):.2f} times that with {COUNTS[0]}; goal: at most 2"
        figures.append(Figure.of(f"{policy}, {COUNTS[0]} adapters", "us", few))
        figures.append(Figure.of(f"{policy}, {COUNTS[1]} adapters", "us", many, ratio))
    return figures


def _microseconds(policy: Policy, count: int, seed: int) -> float:
    """Of one decision on average."""
    choose = random.Random(seed)
    keeper = Keeper(TierRules(policy, owners={"*": OwnerRule(floor_bytes=1000)}))
    items = [Item(f"adapter-{i}", choose.randint(1000, 9000), f"owner-{i // 4}") for i in range(count)]
    for item in items:
        keeper.insert(item, 0.0)
    chosen = choose.choices(items, k=DECISIONS)
    started = time.perf_counter()
    for now, item in enumerate(chosen):
        keeper.touch(item.key, now)
        if now % 2:
            victim = keeper.item(next(keeper.victims(item.owner)))
            keeper.evict(victim.key)
            keeper.insert(victim, now)
    return (time.perf_counter() - started) / DECISIONS * 1e6
