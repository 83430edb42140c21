"""Each policy against a naive model of it, which does what the paper says, one key after the other."""

from __future__ import annotations

import copy
from typing import Any, Protocol

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.swap.policies import Item, Order, Policy, new_order


class Naive(Protocol):
    def insert(self, item: Item) -> None: ...
    def touch(self, key: str) -> None: ...
    def evict(self, key: str) -> None: ...
    def remove(self, key: str) -> None: ...
    def order(self) -> list[str]: ...


class NaiveLRU:
    def __init__(self) -> None:
        self.keys: list[str] = []

    def insert(self, item: Item) -> None:
        self.keys.append(item.key)

    def touch(self, key: str) -> None:
        self.keys.remove(key)
        self.keys.append(key)

    def remove(self, key: str) -> None:
        self.keys.remove(key)

    evict = remove

    def order(self) -> list[str]:
        return self.keys


class NaiveGDSF:
    """H(key) = L + uses * weight, computed at each use; L is the H of the last evicted; ties by last use."""

    def __init__(self, weigh: Any) -> None:
        self.weigh, self.age, self.clock = weigh, 0.0, 0
        self.rows: dict[str, dict[str, Any]] = {}

    def insert(self, item: Item) -> None:
        self.rows[item.key] = {"uses": 0, "weight": self.weigh(item)}
        self.touch(item.key)

    def touch(self, key: str) -> None:
        self.clock += 1
        row = self.rows[key]
        row["uses"] += 1
        row["h"] = (self.age + row["uses"] * row["weight"], self.clock)

    def remove(self, key: str) -> None:
        del self.rows[key]

    def evict(self, key: str) -> None:
        self.age = max(self.age, self.rows.pop(key)["h"][0])

    def order(self) -> list[str]:
        return sorted(self.rows, key=lambda key: self.rows[key]["h"])


class NaiveSieve:
    """The queue from the oldest to the newest, each with its visited bit, and a hand, as in figure 2 of the paper."""

    def __init__(self) -> None:
        self.queue: list[str] = []
        self.visited: dict[str, bool] = {}
        self.hand: str | None = None

    def insert(self, item: Item) -> None:
        self.queue.append(item.key)
        self.visited[item.key] = False

    def touch(self, key: str) -> None:
        self.visited[key] = True

    def evict(self, key: str | None) -> str:
        """The hand's way to the next victim, or to `key`, when nothing else may go."""
        while True:
            self.hand = self.hand or self.queue[0]
            found = self.hand
            if self.visited[found]:
                self.visited[found] = False
            elif key in (None, found):
                self.remove(found)
                return found
            self.hand = self._newer(found)

    def remove(self, key: str) -> None:
        if self.hand == key:
            self.hand = self._newer(key)
        self.queue.remove(key)
        del self.visited[key]

    def order(self) -> list[str]:
        others = copy.deepcopy(self)
        return [others.evict(None) for _ in self.queue]

    def _newer(self, key: str) -> str | None:
        at = self.queue.index(key) + 1
        return self.queue[at] if at < len(self.queue) else None


NAIVE: dict[Policy, Any] = {
    Policy.LRU: NaiveLRU,
    Policy.LFU: lambda: NaiveGDSF(lambda item: 1.0),
    Policy.GDSF: lambda: NaiveGDSF(lambda item: item.cost / item.size),
    Policy.SIEVE: NaiveSieve,
}

_steps = st.lists(
    st.tuples(st.sampled_from(["insert", "insert", "touch", "touch", "next", "evict", "remove"]), st.integers(0, 50)),
    max_size=60,
)


def item(number: int) -> Item:
    return Item(f"key-{number}", 1 + number % 5, cost=1.0 + number % 3)


@pytest.mark.parametrize("policy", Policy)
@given(steps=_steps)
def test_agrees_with_the_paper_after_every_sequence_of_events(policy: Policy, steps: list[tuple[str, int]]) -> None:
    order: Order = new_order(policy)
    naive: Naive = NAIVE[policy]()
    live: list[str] = []
    for now, (event, number) in enumerate(steps):
        if event == "insert":
            order.insert(item(now), now)
            naive.insert(item(now))
            live.append(f"key-{now}")
        elif live:
            key = naive.order()[0] if event == "next" else live[number % len(live)]
            if event == "touch":
                order.touch(key, now)
                naive.touch(key)
            else:
                live.remove(key)
                (order.remove if event == "remove" else order.evict)(key)
                (naive.remove if event == "remove" else naive.evict)(key)
        assert list(order.victims()) == naive.order()
        assert sorted(live, key=order.rank) == naive.order()
        assert list(order.among(live)) == naive.order()
        assert len(order) == len(live)


@pytest.mark.parametrize("policy", Policy)
@given(steps=_steps)
def test_groups_have_the_order_of_all(policy: Policy, steps: list[tuple[str, int]]) -> None:
    whole, parted = new_order(policy), new_order(policy)
    live: list[str] = []
    for now, (event, number) in enumerate(steps):
        if event == "insert":
            whole.insert(item(now), now)
            parted.insert(item(now), now, group=number % 3)
            live.append(f"key-{now}")
        elif live:
            key = live[number % len(live)]
            if event == "touch":
                whole.touch(key, now)
                parted.touch(key, now)
            elif event == "next":
                parted.move(key, (number + 1) % 3)
            else:
                live.remove(key)
                (whole.remove if event == "remove" else whole.evict)(key)
                (parted.remove if event == "remove" else parted.evict)(key)
        for group in range(3):
            assert list(parted.victims(group)) == [k for k in whole.victims() if parted.group(k) == group]


@pytest.mark.parametrize("policy", Policy)
def test_looking_at_victims_changes_nothing_and_a_copy_is_apart(policy: Policy) -> None:
    order = new_order(policy)
    for number in range(9):
        order.insert(item(number), number)
    for number in (2, 5, 2):
        order.touch(f"key-{number}", 10 + number)
    seen = list(order.victims())
    assert list(order.victims()) == seen
    other = order.copy()
    other.evict(seen[0])
    other.touch(seen[1], 20)
    assert list(order.victims()) == seen
    assert list(other.victims()) != seen[1:]


def test_what_is_used_until_later_is_more_recent_to_lru() -> None:
    order = new_order(Policy.LRU)
    for number in range(3):
        order.insert(item(number), number)
    order.rest("key-0", 9)
    assert list(order.victims()) == ["key-1", "key-2", "key-0"]


def test_gdsf_prefers_small_and_dear_ones_and_forgets_old_fame() -> None:
    order = new_order(Policy.GDSF)
    for key, size, cost in [("large", 100, 10.0), ("dear", 100, 50.0), ("small", 10, 10.0)]:
        order.insert(Item(key, size, cost=cost), 0)
    assert list(order.victims()) == ["large", "dear", "small"]
    for _ in range(5):
        order.touch("large", 1)
    assert list(order.victims()) == ["dear", "large", "small"]
    for number in range(40):  # nobody asks for it any more
        order.evict(next(order.victims()))
        order.insert(Item(f"new-{number}", 10, cost=10.0), 2 + number)
    assert "large" not in order
