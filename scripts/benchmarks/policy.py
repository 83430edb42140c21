"""Deciding what goes, with 100 and with 10,000 adapters of owners with a floor each: the policy alone, for a use and
every other time an eviction and a load; and all of what a tier decides, the search for room in one piece among it."""

from __future__ import annotations

import random
import statistics
import time

from figure import Figure

from adapterhub.swap.allocator import aligned
from adapterhub.swap.policies import Item, Keeper, OwnerRule, Policy, Rules, TierRules
from adapterhub.swap.residency import Residency
from benchmarks.peers import Setting

COUNTS = (100, 10_000)
DECISIONS, RUNS = 20_000, 5


def run(_: Setting) -> list[Figure]:
    figures = []
    for what, measure in (("the policy", _policy), ("a tier", _tier)):
        for policy in Policy:
            few, many = ([measure(policy, count, run) for run in range(RUNS)] for count in COUNTS)
            times = f"{statistics.median(many) / statistics.median(few):.2f} times that with {COUNTS[0]}"
            figures.append(Figure.of(f"{what}, {policy}, {COUNTS[0]} adapters", "us", few))
            figures.append(
                Figure.of(f"{what}, {policy}, {COUNTS[1]} adapters", "us", many, f"{times}; goal: at most 2")
            )
    return figures


def _items(choose: random.Random, count: int) -> list[Item]:
    return [Item(f"adapter-{i}", choose.randint(1000, 9000), f"owner-{i // 4}", 1.0) for i in range(count)]


def _rules(policy: Policy) -> TierRules:
    return TierRules(policy, owners={"*": OwnerRule(floor_bytes=1000)})


def _tier(policy: Policy, count: int, seed: int) -> float:
    """Of one use on average, in microseconds, on a device that is full with `count` of twice as many adapters: about
    every other use must make room, where blocks go and others are moved together."""
    choose = random.Random(seed)
    items = _items(choose, 2 * count)
    residency = Residency(sum(aligned(item.size) for item in items[:count]), 0, Rules(device=_rules(policy)))
    chosen = [*items[:count], *choose.choices(items, k=DECISIONS)]
    for now, item in enumerate(chosen):
        if now == count:  # it is full
            started = time.perf_counter()
        if residency.find(item.key) is None:
            admission = residency.admit(item, now)
            assert admission is not None, "nothing is in use"
            residency.arrived(item.key)
        residency.hold(item.key, now)
        residency.release(item.key, now)
    return (time.perf_counter() - started) / DECISIONS * 1e6


def _policy(policy: Policy, count: int, seed: int) -> float:
    """Of one decision on average, in microseconds."""
    choose = random.Random(seed)
    keeper = Keeper(_rules(policy))
    items = _items(choose, count)
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
