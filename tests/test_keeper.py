"""What goes under rules and pins, against a naive keeper that looks at every block, one eviction after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.errors import BadRequest
from adapterhub.swap.policies import Item, Keeper, OwnerRule, Policy, Rules, TierRules

OWNERS = ["ada", "bob", "cyd"]


@dataclass
class Row:
    item: Item
    pinned: bool


def first_to_go(rows: dict[str, Row], keeper: Keeper, owner: str | None) -> str | None:
    """The rules, word by word, over all blocks; only the policy's order is the keeper's."""

    def turn(key: str) -> tuple[Any, ...]:
        item = rows[key].item
        rule = keeper.rules.of(item.owner)
        used = sum(row.item.size for row in rows.values() if row.item.owner == item.owner)
        if rule.ceiling_bytes is not None and used > rule.ceiling_bytes:
            stage = 0
        elif used - item.size >= rule.floor_bytes:
            stage = 1
        else:
            stage = 2 if item.owner == owner else 3
        return stage, rule.priority, keeper.turn(key).rank

    return min((key for key, row in rows.items() if not row.pinned), key=turn, default=None)


def naive_victims(rows: dict[str, Row], keeper: Keeper, owner: str | None) -> list[str]:
    left, victims = dict(rows), []
    while (key := first_to_go(left, keeper, owner)) is not None:
        victims.append(key)
        del left[key]
    return victims


@st.composite
def _rules(draw: st.DrawFn) -> TierRules:
    owners = {}
    for owner in [*OWNERS, "*"]:
        if draw(st.booleans()):
            floor = draw(st.sampled_from([0, 0, 3, 8]))
            ceiling = draw(st.sampled_from([None, floor, floor + 6]))
            owners[owner] = OwnerRule(floor, ceiling, draw(st.sampled_from([0, 1, 2])))
    return TierRules(draw(st.sampled_from(Policy)), draw(st.sampled_from([None, 5.0, 20.0])), owners)


_events = ["insert", "insert", "insert", "touch", "touch", "rest", "pin", "unpin", "evict", "remove", "rules"]
_steps = st.lists(st.tuples(st.sampled_from(_events), st.integers(0, 50)), max_size=40)


@given(rules=_rules(), other=_rules(), steps=_steps)
def test_what_goes_first_is_what_the_rules_say(
    rules: TierRules, other: TierRules, steps: list[tuple[str, int]]
) -> None:
    keeper, rows = Keeper(rules), dict[str, Row]()
    uses: dict[str, float] = {}
    for now, (event, number) in enumerate(steps):
        keys = list(rows)
        key = keys[number % len(keys)] if keys else ""
        if event == "insert":
            item = Item(f"key-{now}", 1 + number % 4, OWNERS[number % 3], 1.0 + number % 2)
            rows[item.key] = Row(item, number % 7 == 0)
            keeper.insert(item, now, pinned=number % 7 == 0)
            uses[item.key] = now
        elif event == "rules":
            keeper = keeper.with_rules(other)
        elif keys:
            if event in ("pin", "unpin"):
                uses[key] = now if event == "unpin" and rows[key].pinned else uses[key]
                rows[key].pinned = event == "pin"
            elif event in ("touch", "rest"):
                uses[key] = now
            else:
                del rows[key]
            times = [now] if event in ("unpin", "touch", "rest") else []
            getattr(keeper, event)(key, *times)
        keeper.check_integrity()
        for owner in (None, "ada", "dot"):
            assert list(keeper.victims(owner)) == naive_victims(rows, keeper, owner)
        ttl = keeper.rules.ttl_seconds
        expired = {k for k, row in rows.items() if not row.pinned and ttl is not None and now - uses[k] >= ttl}
        assert set(keeper.expired(now)) == expired


@given(rules=_rules(), sizes=st.lists(st.integers(1, 4), max_size=12), size=st.integers(1, 8), busy=st.integers(0, 99))
def test_room_is_made_under_budget_and_ceiling_as_long_as_something_may_go(
    rules: TierRules, sizes: list[int], size: int, busy: int
) -> None:
    keeper, budget = Keeper(rules), 20
    usable = lambda key: hash_of(key) % 5 != busy % 5  # noqa: E731
    for number, nbytes in enumerate(sizes):
        keeper.insert(Item(f"key-{number}", nbytes, OWNERS[number % 3]), number, pinned=number % 6 == 5)
    may_go = {key for key in keeper if usable(key) and not keeper.is_pinned(key)}
    chosen = keeper.room(Item("new", size, "ada"), budget, usable)
    if chosen is None:
        assert keeper.used_bytes - sum(keeper.item(key).size for key in may_go) + size > budget
        return
    assert set(chosen) <= may_go
    assert len(set(chosen)) == len(chosen)
    for key in chosen:
        keeper.evict(key)
    keeper.check_integrity()
    assert keeper.used_bytes + size <= budget
    ceiling = rules.of("ada").ceiling_bytes
    if ceiling is not None and keeper.used_by("ada") + size > ceiling:
        assert not [key for key in keeper if key in may_go and keeper.item(key).owner == "ada"]


def hash_of(key: str) -> int:
    return sum(map(ord, key))


def filled(rules: TierRules) -> Keeper:
    """Three blocks of each owner's, of 2 bytes; ada's were used longest ago."""
    keeper = Keeper(rules)
    for owner in OWNERS:
        for number in range(3):
            keeper.insert(Item(f"{owner}-{number}", 2, owner), len(keeper))
    return keeper


def test_an_owner_is_not_pushed_below_their_floor_by_others_but_by_themselves() -> None:
    keeper = filled(TierRules(owners={"ada": OwnerRule(floor_bytes=4)}))
    assert list(keeper.victims("bob"))[:2] == ["ada-0", "bob-0"]
    assert list(keeper.victims("ada"))[-2:] == ["ada-1", "ada-2"]
    assert keeper.room(Item("new", 16, "bob"), 18) == [
        *("ada-0", "bob-0", "bob-1", "bob-2", "cyd-0", "cyd-1", "cyd-2"),
        "ada-1",  # rather than that the request fails
    ]


def test_a_load_over_the_ceiling_takes_its_own_owners_place() -> None:
    keeper = filled(TierRules(owners={"cyd": OwnerRule(ceiling_bytes=6)}))
    assert keeper.room(Item("new", 3, "cyd"), 100) == ["cyd-0", "cyd-1"]
    assert keeper.room(Item("new", 3, "bob"), 100) == []


def test_low_priority_goes_before_high_whatever_was_used_last() -> None:
    owners = {"ada": OwnerRule(priority=2), "cyd": OwnerRule(priority=0)}
    order = list(filled(TierRules(owners=owners)).victims())
    assert [key[:3] for key in order] == ["cyd"] * 3 + ["bob"] * 3 + ["ada"] * 3


def test_what_rules_let_go_of_at_once_is_what_is_old_over_a_ceiling_or_over_budget() -> None:
    keeper = filled(TierRules(ttl_seconds=7, owners={"bob": OwnerRule(ceiling_bytes=4)}))
    assert keeper.unlawful(now=8, budget=100) == ["ada-0", "ada-1", "bob-0"]
    assert keeper.unlawful(now=8, budget=10) == ["ada-0", "ada-1", "bob-0", "ada-2"]
    keeper.pin("ada-0")
    assert keeper.unlawful(now=8, budget=1) is None


# -- rules as JSON


@given(device=_rules(), ram=_rules())
def test_rules_are_read_as_they_were_written(device: TierRules, ram: TierRules) -> None:
    rules = Rules(device=device, ram=ram)
    assert Rules().merged(rules.json) == rules


def test_what_is_left_out_stays() -> None:
    rules = Rules().merged({"ram": {"policy": "gdsf"}}).merged({"device": {"ttl_seconds": 60}})
    assert (rules.ram.policy, rules.device) == (Policy.GDSF, TierRules(ttl_seconds=60))


@pytest.mark.parametrize(
    ("data", "param", "says"),
    [
        ([], "rules", "must be an object"),
        ({"gpu": {}}, "rules", "no field 'gpu'; there are device, ram, disk"),
        ({"ram": None}, "ram", "must be an object"),
        ({"ram": {"policy": "fifo"}}, "ram.policy", "there are lru, lfu, gdsf, sieve"),
        ({"ram": {"ttl_seconds": 0}}, "ram.ttl_seconds", "above 0"),
        ({"ram": {"ttl_seconds": True}}, "ram.ttl_seconds", "above 0"),
        ({"ram": {"owners": []}}, "ram.owners", "for each owner"),
        ({"ram": {"owners": {"ada": {"floor": 1}}}}, "ram.owners.ada", "no field 'floor'"),
        ({"ram": {"owners": {"ada": {"floor_bytes": -1}}}}, "ram.owners.ada.floor_bytes", "not a number of bytes"),
        (
            {"ram": {"owners": {"ada": {"floor_bytes": 5, "ceiling_bytes": 4}}}},
            "ram.owners.ada.ceiling_bytes",
            "below the floor of 5",
        ),
        ({"ram": {"owners": {"ada": {"priority": 3}}}}, "ram.owners.ada.priority", "0, 1 or 2"),
    ],
)
def test_rules_that_make_no_sense_are_refused(data: Any, param: str, says: str) -> None:
    with pytest.raises(BadRequest, match=says) as caught:
        Rules().merged(data)
    assert caught.value.param == param
