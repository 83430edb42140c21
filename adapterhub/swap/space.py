"""One tier in memory as extents: which block lies where, and what goes or moves so that another comes in.

Plain data without torch, SQL or a clock: sizes are bytes, times come from the caller and never go back.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from adapterhub.swap.allocator import ExtentAllocator, Span, aligned
from adapterhub.swap.policies import Item, Keeper, TierRules
from adapterhub.swap.room import Room, Search

PINNED_SHARE = 0.75  # of a budget; what is to be pinned beyond that waits for its turn, so that requests find room


class Move(NamedTuple):
    """A block's `size` bytes go from `source` to `target`, which may overlap. Moves are made one after the other."""

    key: str
    source: int
    target: int
    size: int


class Admission(NamedTuple):
    """What makes room for a block at byte `start`: first these go, then those move."""

    start: int
    evicted: list[str]
    moves: list[Move]


class Change(NamedTuple):
    """The keeper under other rules, and what goes."""

    keeper: Keeper
    gone: list[str]

    @property
    def sizes(self) -> list[tuple[str, int]]:
        return [(key, self.keeper.item(key).size) for key in self.gone]


@dataclass
class Place:
    """Where a block is."""

    start: int
    size: int
    users: int = 0
    loading: bool = False  # it is written to, and stays where it is
    fresh: bool = True  # nobody has used it yet: its admission counts as its first use

    @property
    def busy(self) -> bool:
        return self.loading or self.users > 0


class Space:
    """`capacity` bytes. What is busy is not evicted; without `moves`, nothing is moved so that another comes in."""

    def __init__(self, capacity: int, rules: TierRules, *, moves: bool) -> None:
        self.allocator = ExtentAllocator(capacity)
        self.keeper = Keeper(rules)
        self.moves = moves
        self.busy_bytes = 0
        self.places: dict[str, Place] = {}
        self._at: dict[int, str] = {}  # start -> key
        self._to_pin: dict[str, None] = {}  # what is here and pinned as soon as others' pins leave room, in order
        self._refused: int | None = None  # bytes for which there was no room, and nothing has left since

    def key_at(self, start: int) -> str:
        """Whose place begins there."""
        return self._at[start]

    def admit(
        self, item: Item, now: float, *, pinned: bool = False, spare: Collection[str] = (), loading: bool = False
    ) -> Admission | None:
        """Makes room for a block that is not here, without the blocks of `spare`, and gives it its place.

        None, and nothing changes, when what is busy or pinned leaves no room.
        """
        size = aligned(max(item.size, 1))
        if size > self.allocator.capacity or (self._refused is not None and size >= self._refused):
            return None
        room = Search(self, item, size, spare).run()
        if room is None:
            if not spare:
                self._refused = size
            return None
        admission = self._take_room(room, size)
        self.places[item.key] = Place(admission.start, size, loading=loading)
        self.busy_bytes += size if loading else 0
        self._at[admission.start] = item.key
        self.keeper.insert(item._replace(size=size), now)
        if pinned:
            self.pin(item.key, True, now)
        return admission

    def fits(self, item: Item, released: Collection[str]) -> bool:
        """Whether there would be room for a block that is not here, if nobody used those of `released`."""
        size = aligned(max(item.size, 1))
        return size <= self.allocator.capacity and Search(self, item, size, (), released).run() is not None

    def arrived(self, key: str) -> None:
        place = self.places[key]
        place.loading = False
        self._rest(place)

    def take(self, key: str) -> Place:
        """One more user."""
        place = self.places[key]
        self.busy_bytes += 0 if place.busy else place.size
        place.users += 1
        return place

    def leave(self, key: str) -> None:
        """One user less: it may be evicted now, unless others use it."""
        place = self.places[key]
        place.users -= 1
        self._rest(place)

    def remove(self, key: str) -> None:
        """It leaves for another reason than that another comes."""
        pinned = self.keeper.is_pinned(key)
        self._forget(key)
        self.keeper.remove(key)
        if pinned:
            self._pin_more()

    # -- what operators change

    def pin(self, key: str, pinned: bool, now: float) -> None:
        """What has no room beside other pins is pinned when they leave some."""
        if pinned:
            if not self.keeper.is_pinned(key):
                self._to_pin[key] = None
        else:
            self._to_pin.pop(key, None)
            self.keeper.unpin(key, now)
            self._refused = None
        self._pin_more()

    def plan(self, rules: TierRules | None, capacity: int | None, now: float) -> Change | None:
        """What would go at once under other rules or another capacity. None when what must stay would not fit, or what
        is pinned would be more than its share."""
        keeper = self.keeper if rules is None else self.keeper.with_rules(rules)
        capacity = self.allocator.capacity if capacity is None else ExtentAllocator(capacity).capacity
        if keeper.pinned_bytes > PINNED_SHARE * capacity:
            return None
        gone = keeper.unlawful(now, capacity, lambda key: not self.places[key].busy)
        return None if gone is None else Change(keeper, gone)

    def carry_out(self, change: Change, capacity: int | None) -> None:
        """Puts a plan into force. With a capacity, which may change only while nothing is loading, all blocks lie
        elsewhere."""
        self.keeper = change.keeper
        for key in change.gone:
            self._forget(key)
            self.keeper.evict(key)
        if capacity is not None:
            self._lay_out(capacity)
        self._refused = None
        self._pin_more()

    def expire(self, now: float) -> list[tuple[str, int]]:
        """Lets go of what was unused for too long; what that was, and its bytes."""
        gone = [(key, self.places[key].size) for key in self.keeper.expired(now) if not self.places[key].busy]
        for key, _ in gone:
            self.remove(key)
        return gone

    def check_integrity(self) -> None:
        """Raises AssertionError unless extents, places and keeper agree."""
        self.allocator.check_integrity()
        self.keeper.check_integrity()
        assert set(self.keeper) == self.places.keys(), "the keeper has other blocks than have places"
        assert self._at == {place.start: key for key, place in self.places.items()}, "the index of places is wrong"
        assert self.busy_bytes == sum(p.size for p in self.places.values() if p.busy), "busy bytes drifted"
        for place in self.places.values():
            assert self.allocator.at(place.start) == Span(place.start, place.size, False), "an extent has no block"
            assert place.users >= 0, "released more often than held"
        assert self.keeper.used_bytes == self.allocator.used_bytes, "an extent leaked"
        assert self.keeper.pinned_bytes <= PINNED_SHARE * self.allocator.capacity, "pins leave requests no room"
        for key in self._to_pin:
            assert not self.keeper.is_pinned(key), "it is pinned already"
            assert not self._may_pin(self.keeper.item(key).size), "it could be pinned, and is not"

    # -- how it is done

    def _may_pin(self, size: int) -> bool:
        return self.keeper.pinned_bytes + size <= PINNED_SHARE * self.allocator.capacity

    def _pin_more(self) -> None:
        for key in list(self._to_pin):
            if self._may_pin(self.keeper.item(key).size):
                del self._to_pin[key]
                self.keeper.pin(key)

    def _take_room(self, room: Room, size: int) -> Admission:
        """Evicts what goes, moves what stays in the window to its beginning, and takes the bytes after it."""
        for key in room.evicted:
            self._forget(key)
            self.keeper.evict(key)
        if room.window is None:
            start = self.allocator.allocate(size)
            assert start is not None, "there was a hole"
            return Admission(start, room.evicted, [])
        moves: list[Move] = []
        free_at = at = room.window.start
        while at < room.window.end:
            span = self.allocator.at(at)
            assert span is not None
            if span.free:
                at = span.end
                continue
            if span.start != free_at:
                moves.append(self._move(span, free_at))
            free_at = at = free_at + span.size  # what follows is a hole that has grown, or a block
        self.allocator.allocate_at(free_at, size)
        return Admission(free_at, room.evicted, moves)

    def _move(self, span: Span, target: int) -> Move:
        key = self._at.pop(span.start)
        self.allocator.release(span.start)
        self.allocator.allocate_at(target, span.size)
        self._at[target] = key
        self.places[key].start = target
        return Move(key, span.start, target, span.size)

    def _lay_out(self, capacity: int) -> None:
        """All blocks side by side, in the order in which they lay, in a pool of another size."""
        assert not any(place.loading for place in self.places.values()), "what is on its way cannot be moved"
        self.allocator = ExtentAllocator(capacity)
        at = 0
        keys = [key for _, key in sorted(self._at.items())]
        self._at = {}
        for key in keys:
            place = self.places[key]
            self.allocator.allocate_at(at, place.size)
            place.start = at
            self._at[at] = key
            at += place.size

    def _rest(self, place: Place) -> None:
        """It may be evicted now, unless others hold it."""
        if not place.busy:
            self.busy_bytes -= place.size
            self._refused = None

    def _forget(self, key: str) -> None:
        place = self.places.pop(key)
        self._to_pin.pop(key, None)
        self.busy_bytes -= place.size if place.busy else 0
        del self._at[place.start]
        self.allocator.release(place.start)
        self._refused = None
