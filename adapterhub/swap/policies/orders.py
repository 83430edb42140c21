"""Eviction policies, each an order over keys in which the next to go comes first.

Keys stand in sorted lines, so that no operation takes longer because there are more keys. There may be several lines,
called groups: the keys of each come in the order that they have among all.
"""

from __future__ import annotations

import copy
import heapq
from collections.abc import Hashable, Iterable, Iterator
from enum import StrEnum
from typing import Any, NamedTuple, Self

from sortedcontainers import SortedList


class Policy(StrEnum):
    LRU = "lru"
    LFU = "lfu"
    GDSF = "gdsf"
    SIEVE = "sieve"


class Item(NamedTuple):
    """What a tier keeps under a key. `cost` is that of bringing it back once it has gone, in any unit."""

    key: str
    size: int  # bytes
    owner: str = ""
    cost: float = 1.0


class Order:
    """What the policies share. A subclass gives each key an entry, a tuple that sorts first for who goes first, and
    whose last part is the key."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Any, ...]] = {}
        self._groups: dict[str, Hashable] = {}
        self._lines: dict[Hashable, SortedList] = {}
        self._count = 0  # of entries, whose numbers break ties: who came or was used first goes first

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    # -- what happens to keys; times never go back

    def insert(self, item: Item, now: float, group: Hashable = None) -> None:
        """A new key, used now for the first time."""
        raise NotImplementedError

    def touch(self, key: str, now: float) -> None:
        """It was used again."""
        raise NotImplementedError

    def rest(self, key: str, now: float) -> None:
        """A use that began earlier has ended."""

    def evict(self, key: str) -> None:
        """It went to make room, from which an order may learn."""
        self.remove(key)

    def remove(self, key: str) -> None:
        """It went for another reason."""
        self._lines[self._groups.pop(key)].remove(self._entries.pop(key))

    def move(self, key: str, group: Hashable) -> None:
        """To another group, where it keeps its place in the order."""
        self._lines[self._groups[key]].remove(self._entries[key])
        self._place(self._entries[key], group)

    def group(self, key: str) -> Any:
        return self._groups[key]

    def copy(self) -> Self:
        other = copy.copy(self)
        for name, value in vars(self).items():
            setattr(other, name, copy.copy(value))
        other._lines = {group: line.copy() for group, line in self._lines.items()}
        return other

    # -- who goes first

    def victims(self, group: Hashable = None) -> Iterator[str]:
        """The keys of a group, the next to go first. Lazily: change nothing before you have seen enough."""
        return (entry[-1] for entry in self._lines.get(group, ()))

    def among(self, keys: Iterable[str]) -> Iterator[str]:
        """`keys` in the order in which they would go, whatever their groups."""
        heap = [(self.rank(key), key) for key in keys]
        heapq.heapify(heap)
        while heap:
            yield heapq.heappop(heap)[1]

    def rank(self, key: str) -> tuple[Any, ...]:
        """Compares as the keys do in the order: the smaller goes first."""
        return self._entries[key]

    # -- for subclasses

    def _number(self) -> int:
        self._count += 1
        return self._count

    def _place(self, entry: tuple[Any, ...], group: Hashable) -> None:
        key = entry[-1]
        self._entries[key], self._groups[key] = entry, group
        line = self._lines.get(group)
        if line is None:
            line = self._lines[group] = SortedList()
        line.add(entry)

    def _replace(self, entry: tuple[Any, ...]) -> None:
        """A known key gets another entry."""
        key = entry[-1]
        line = self._lines[self._groups[key]]
        line.remove(self._entries[key])
        line.add(entry)
        self._entries[key] = entry


class LRU(Order):
    """Least recently used first; what is in use counts as used until it rests."""

    def insert(self, item: Item, now: float, group: Hashable = None) -> None:
        self._place((now, self._number(), item.key), group)

    def touch(self, key: str, now: float) -> None:
        self._replace((now, self._number(), key))

    def rest(self, key: str, now: float) -> None:
        self.touch(key, now)


class GDSF(Order):
    """Greedy-Dual-Size-Frequency: by `age + uses * cost / size`, where the order's age is what the last one had that
    was evicted. So small, dear and often used ones stay, and what is used no more is overtaken in the end; equals go in
    the order of their last use. Source: Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency
    Caching Policy" (1998).
    """

    def __init__(self) -> None:
        super().__init__()
        self._age = 0.0
        self._uses: dict[str, int] = {}
        self._weights: dict[str, float] = {}

    def insert(self, item: Item, now: float, group: Hashable = None) -> None:
        self._uses[item.key] = 1
        self._weights[item.key] = self._weight(item)
        self._place(self._entry(item.key), group)

    def touch(self, key: str, now: float) -> None:
        self._uses[key] += 1
        self._replace(self._entry(key))

    def evict(self, key: str) -> None:
        self._age = max(self._age, self._entries[key][0])
        self.remove(key)

    def remove(self, key: str) -> None:
        super().remove(key)
        del self._uses[key], self._weights[key]

    def _entry(self, key: str) -> tuple[Any, ...]:
        return (self._age + self._uses[key] * self._weights[key], self._number(), key)

    def _weight(self, item: Item) -> float:
        return item.cost / max(item.size, 1)


class LFU(GDSF):
    """Least frequently used first, with dynamic aging: GDSF where all weigh the same, so that a key which was popular
    long ago does not stay for ever. Source: Arlitt et al., "Evaluating Content Management Techniques for Web Proxy
    Caches" (2000), LFU-DA."""

    def _weight(self, item: Item) -> float:
        return 1.0


class Sieve(Order):
    """SIEVE: keys in a queue, in the order in which they came, and a hand that goes from the oldest to the newest and
    then starts over; it evicts who was not used since it last came by, and passes over the others once. Source: Zhang
    et al., "SIEVE is Simpler than LRU" (NSDI 2024).

    An entry is (used since, place in the queue, key): so the hand's way is four stretches of a sorted line.
    """

    def __init__(self) -> None:
        super().__init__()
        self._hand = 0  # the place it comes to next

    def insert(self, item: Item, now: float, group: Hashable = None) -> None:
        place = self._number()
        self._place((False, place, item.key), group)

    def touch(self, key: str, now: float) -> None:
        used, place, _ = self._entries[key]
        if not used:
            self._replace((True, place, key))

    def evict(self, key: str) -> None:
        """The hand goes to this key, and forgets the uses of those it passes."""
        used, place, _ = self._entries[key]
        if used:
            self._forget(0, None)
        elif place >= self._hand:
            self._forget(self._hand, place)
        else:
            self._forget(self._hand, None)
            self._forget(0, place)
        self._hand = place + 1
        self.remove(key)

    def remove(self, key: str) -> None:
        super().remove(key)
        newest = next(reversed(self._entries), None)  # a dict keeps the order in which its keys came
        if newest is None or self._entries[newest][1] < self._hand:
            self._hand = 0

    def victims(self, group: Hashable = None) -> Iterator[str]:
        line = self._lines.get(group)
        if line is None:
            return
        for used in (False, True):
            for begin, end in (((used, self._hand), (used, float("inf"))), ((used, -1), (used, self._hand))):
                for entry in line.irange(begin, end, inclusive=(True, False)):
                    yield entry[-1]

    def rank(self, key: str) -> tuple[Any, ...]:
        used, place, _ = self._entries[key]
        return (used, place < self._hand, place)

    def _forget(self, begin: int, end: int | None) -> None:
        """Takes back the uses of those at places [begin, end): each use was worth one pass of the hand."""
        for line in self._lines.values():
            stop = float("inf") if end is None else end
            for entry in list(line.irange((True, begin), (True, stop), inclusive=(True, False))):
                self._replace((False, *entry[1:]))


_ORDERS: dict[Policy, type[Order]] = {Policy.LRU: LRU, Policy.LFU: LFU, Policy.GDSF: GDSF, Policy.SIEVE: Sieve}


def new_order(policy: Policy) -> Order:
    return _ORDERS[policy]()
