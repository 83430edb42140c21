"""A keeper knows what one tier holds, and says what goes: the policy's order within what pins and rules allow.

What goes first are blocks of owners over their ceiling, then others, low priority before high; last, where there is no
other way, those that a floor shelters. What is pinned is never named. Nothing here takes longer because the tier holds
more, but for an owner with a floor or a ceiling: of their own blocks each may be looked at when one comes or goes.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, NamedTuple

from adapterhub.swap.policies.orders import Item, new_order
from adapterhub.swap.policies.rules import PRIORITIES, TierRules


class Stage(IntEnum):
    """When a block's turn comes."""

    OVER = 0  # its owner is over their ceiling
    OPEN = 1
    OWN = 2  # sheltered, but it is its own owner who needs the room
    SHELTERED = 3  # without it, its owner would be below their floor


class Turn(NamedTuple):
    """The smaller goes first."""

    stage: Stage
    priority: int
    rank: tuple[Any, ...]


@dataclass
class Share:
    """What an owner has in the tier."""

    used: int = 0  # bytes
    largest: int = 0  # bytes of the largest block they ever had here
    keys: set[str] = field(default_factory=set)  # but for those that are pinned


def _always(_: str) -> bool:
    return True


class Keeper:
    """Times come from the caller and never go back."""

    def __init__(self, rules: TierRules | None = None) -> None:
        self.rules = rules or TierRules()
        self.used_bytes = 0
        self.pinned_bytes = 0
        self._order = new_order(self.rules.policy)
        self._items: dict[str, Item] = {}
        self._pinned: dict[str, float] = {}  # last use; pinned ones are not in the order
        self._last_use: OrderedDict[str, float] = OrderedDict()  # of the others, the longest ago first
        self._shares: dict[str, Share] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def item(self, key: str) -> Item:
        return self._items[key]

    def is_pinned(self, key: str) -> bool:
        return key in self._pinned

    @property
    def pinned(self) -> int:
        return len(self._pinned)

    def last_use(self, key: str) -> float:
        return self._pinned[key] if key in self._pinned else self._last_use[key]

    def used_by(self, owner: str) -> int:
        return self._shares[owner].used if owner in self._shares else 0

    # -- what happens

    def insert(self, item: Item, now: float, *, pinned: bool = False) -> None:
        """A new key, used now."""
        assert item.key not in self._items, f"{item.key} is here already"
        self._items[item.key] = item
        self.used_bytes += item.size
        share = self._shares.setdefault(item.owner, Share())
        share.used += item.size
        share.largest = max(share.largest, item.size)
        if pinned:
            self._pinned[item.key] = now
            self.pinned_bytes += item.size
        else:
            self._enter(item, now)
        self._sort(item.owner, share.used - item.size)

    def touch(self, key: str, now: float) -> None:
        """It was used again."""
        if self._note_use(key, now):
            self._order.touch(key, now)

    def rest(self, key: str, now: float) -> None:
        """A use that began earlier has ended."""
        if self._note_use(key, now):
            self._order.rest(key, now)

    def evict(self, key: str) -> None:
        """It went to make room, from which the policy learns."""
        if key not in self._pinned:
            self._order.evict(key)
        self._forget(key)

    def remove(self, key: str) -> None:
        """It went for another reason."""
        if key not in self._pinned:
            self._order.remove(key)
        self._forget(key)

    def pin(self, key: str) -> None:
        if key not in self._pinned:
            item = self._items[key]
            self._order.remove(key)
            self._pinned[key] = self._last_use.pop(key)
            self._shares[item.owner].keys.remove(key)
            self.pinned_bytes += item.size

    def unpin(self, key: str, now: float) -> None:
        """From now on it may go; it counts as used now."""
        if key in self._pinned:
            item = self._items[key]
            del self._pinned[key]
            self.pinned_bytes -= item.size
            self._enter(item, now)

    def with_rules(self, rules: TierRules) -> Keeper:
        """Another keeper of the same blocks under other rules. A policy that stays keeps what it knows of their use."""
        other = Keeper(rules)
        other.used_bytes, other.pinned_bytes = self.used_bytes, self.pinned_bytes
        other._items, other._pinned, other._last_use = self._items.copy(), self._pinned.copy(), self._last_use.copy()
        other._shares = {name: replace(share, keys=set(share.keys)) for name, share in self._shares.items()}
        if rules.policy is self.rules.policy:
            other._order = self._order.copy()
            for key in other._last_use:
                other._order.move(key, other._group(self._items[key]))
        else:
            for key, used in other._last_use.items():
                other._order.insert(self._items[key], used, other._group(self._items[key]))
        return other

    # -- what goes

    def turn(self, key: str, owner: str | None = None, gone: Counter[str] | None = None) -> Turn:
        """When the block's turn would come if `owner` needed room, and owners had lost the bytes of `gone` already."""
        item = self._items[key]
        rule = self.rules.of(item.owner)
        left = self._shares[item.owner].used - (gone[item.owner] if gone else 0)
        stage = self._stage(item, left)
        if stage is Stage.SHELTERED and item.owner == owner:
            stage = Stage.OWN
        return Turn(stage, rule.priority, self._order.rank(key))

    def victims(
        self, owner: str | None = None, usable: Callable[[str], bool] = _always, gone: Iterable[str] = ()
    ) -> Iterator[str]:
        """What goes for a load of `owner`'s, the next first, each as if those before it, and those of `gone`, had gone
        already. Lazily: change nothing before you have seen enough."""
        skipped = set(gone)
        lost = Counter[str]()
        for key in skipped:
            lost[self._items[key].owner] += self._items[key].size
        later: list[tuple[Turn, str]] = []  # a heap of those whose turn was put off by what went before them

        def settle(turn: Turn, key: str) -> bool:
            """Whether it goes now."""
            due = self.turn(key, owner, lost)
            if due > turn:
                heapq.heappush(later, (due, key))
                return False
            lost[self._items[key].owner] += self._items[key].size
            return True

        for turn, key in self._in_turn(owner):
            while later and later[0][0] < turn:
                if settle(*(put_off := heapq.heappop(later))):
                    yield put_off[1]
            if key not in skipped and usable(key) and settle(turn, key):
                yield key
        while later:
            if settle(*(put_off := heapq.heappop(later))):
                yield put_off[1]

    def room(self, item: Item, budget: int, usable: Callable[[str], bool] = _always) -> list[str] | None:
        """Which to evict so that `item` comes in under `budget` bytes and, as far as may be, under its owner's ceiling.
        None when what is pinned or not `usable` leaves no room."""
        chosen = self.over_ceiling(item.owner, item.size, usable)
        return self._and_more(chosen, item.size, budget, item.owner, usable)

    def over_ceiling(self, owner: str, size: int = 0, usable: Callable[[str], bool] = _always) -> list[str]:
        """Which of an owner's blocks go so that `size` more bytes stay under their ceiling, as far as they can."""
        ceiling = self.rules.of(owner).ceiling_bytes
        excess = 0 if ceiling is None else self.used_by(owner) + size - ceiling
        chosen: list[str] = []
        if excess > 0 and owner in self._shares:
            for key in self._order.among(filter(usable, self._shares[owner].keys)):
                if excess <= 0:
                    break
                chosen.append(key)
                excess -= self._items[key].size
        return chosen

    def unlawful(self, now: float, budget: int, usable: Callable[[str], bool] = _always) -> list[str] | None:
        """What the rules let go of at once: what was unused for too long, what is over a ceiling, and what is over
        `budget` bytes. None when what is pinned or not `usable` does not fit there."""
        chosen = list(filter(usable, self.expired(now)))
        expired = Counter[str]()
        for key in chosen:
            expired[self._items[key].owner] += self._items[key].size
        seen = set(chosen)
        for owner in self._shares:
            chosen += self.over_ceiling(owner, -expired[owner], lambda key: key not in seen and usable(key))
        return self._and_more(chosen, 0, budget, None, usable)

    def expired(self, now: float) -> Iterator[str]:
        """What was unused for too long, the longest first."""
        ttl = self.rules.ttl_seconds
        if ttl is not None:
            yield from itertools.takewhile(lambda key: now - self._last_use[key] >= ttl, self._last_use)

    def check_integrity(self) -> None:
        """Raises AssertionError unless sums, groups and pins agree with the items."""
        assert self.used_bytes == sum(item.size for item in self._items.values()), "used bytes drifted"
        assert self.pinned_bytes == sum(self._items[key].size for key in self._pinned), "pinned bytes drifted"
        assert {*self._pinned, *self._last_use} == self._items.keys(), "a key is neither pinned nor in the order"
        assert len(self._order) == len(self._last_use), "the order has other keys"
        assert sum(share.used for share in self._shares.values()) == self.used_bytes, "owners' bytes drifted"
        for key in self._last_use:
            assert self._order.group(key) == self._group(self._items[key]), f"{key} stands in the wrong group"

    # -- how it is done

    def _and_more(
        self, chosen: list[str], size: int, budget: int, owner: str | None, usable: Callable[[str], bool]
    ) -> list[str] | None:
        """`chosen`, and what else goes so that `size` more bytes come in under `budget`."""
        needed = self.used_bytes + size - budget - sum(self._items[key].size for key in chosen)
        if needed > 0:
            for key in self.victims(owner, usable, list(chosen)):
                chosen.append(key)
                needed -= self._items[key].size
                if needed <= 0:
                    break
        return chosen if needed <= 0 else None

    def _in_turn(self, owner: str | None) -> Iterator[tuple[Turn, str]]:
        """All that is not pinned, with the turn of each as things are now, in order."""

        def ranked(stage: Stage, priority: int, keys: Iterable[str]) -> Iterator[tuple[Turn, str]]:
            return ((Turn(stage, priority, self._order.rank(key)), key) for key in keys)

        for stage in (Stage.OVER, Stage.OPEN):
            for priority in PRIORITIES:
                yield from ranked(stage, priority, self._order.victims((stage, priority)))
        own = self._shares[owner].keys if owner in self._shares else set()
        sheltered = (key for key in own if self._order.group(key)[0] is Stage.SHELTERED)
        yield from ranked(Stage.OWN, self.rules.of(owner or "").priority, self._order.among(sheltered))
        for priority in PRIORITIES:
            others = (key for key in self._order.victims((Stage.SHELTERED, priority)) if key not in own)
            yield from ranked(Stage.SHELTERED, priority, others)

    def _stage(self, item: Item, used: int) -> Stage:
        """Of a block of an owner who has `used` bytes."""
        rule = self.rules.of(item.owner)
        if rule.ceiling_bytes is not None and used > rule.ceiling_bytes:
            return Stage.OVER
        return Stage.SHELTERED if used - item.size < rule.floor_bytes else Stage.OPEN

    def _group(self, item: Item) -> tuple[Stage, int]:
        return self._stage(item, self._shares[item.owner].used), self.rules.of(item.owner).priority

    def _sort(self, owner: str, before: int) -> None:
        """Moves the owner's blocks to where they stand, now that they have other than the `before` bytes."""
        rule, share = self.rules.of(owner), self._shares[owner]
        ceiling = rule.ceiling_bytes
        crossed = ceiling is not None and (before > ceiling) != (share.used > ceiling)
        if crossed or min(before, share.used) - share.largest < rule.floor_bytes > 0:
            for key in share.keys:
                group = self._group(self._items[key])
                if group != self._order.group(key):
                    self._order.move(key, group)

    def _enter(self, item: Item, now: float) -> None:
        self._shares[item.owner].keys.add(item.key)
        self._last_use[item.key] = now
        self._order.insert(item, now, self._group(item))

    def _note_use(self, key: str, now: float) -> bool:
        """Whether the order should hear of it."""
        if key in self._pinned:
            self._pinned[key] = now
            return False
        self._last_use[key] = now
        self._last_use.move_to_end(key)
        return True

    def _forget(self, key: str) -> None:
        item = self._items.pop(key)
        share = self._shares[item.owner]
        self.used_bytes -= item.size
        share.used -= item.size
        if key in self._pinned:
            del self._pinned[key]
            self.pinned_bytes -= item.size
        else:
            del self._last_use[key]
            share.keys.remove(key)
        if share.used:
            self._sort(item.owner, share.used + item.size)
        else:
            del self._shares[item.owner]
