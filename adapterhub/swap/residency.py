"""Which block is in which tier in memory, and what goes or moves so that another comes in: decisions alone.

Plain data without torch, SQL or a clock: sizes are bytes, times come from the caller and never go back. `Tiers` carries
out what is decided here, and a simulator replays a trace over it, so that both do the same.

The life of a block on the device: `admit` (room is made, and it is on its way), `arrived`, `hold` and `release` for
each request that uses it, `remove`. What is on its way stays where it is; what is held may be moved, not evicted.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from adapterhub.swap.allocator import ExtentAllocator, Span, aligned
from adapterhub.swap.policies import Item, Keeper, Rules
from adapterhub.swap.ref import Tier
from adapterhub.swap.room import Room, Search

PINNED_SHARE = 0.75  # of a budget; what is pinned beyond that counts as not pinned, so that requests find room
_LOAD_OVERHEAD = 2 * 1024**2  # a load takes as long as reading so many bytes more


def item_of(digest: str, size: int, owner: str) -> Item:
    """What a tier in memory keeps; its cost is that of reading it again."""
    return Item(digest, size, owner, float(size + _LOAD_OVERHEAD))


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


class Plan(NamedTuple):
    """What would go, and how many bytes each has: of the device, and of RAM."""

    device: list[tuple[str, int]]
    ram: list[tuple[str, int]]


@dataclass
class Place:
    """Where a block is on the device."""

    start: int
    size: int
    users: int = 0
    loading: bool = True
    fresh: bool = True  # nobody has used it yet: its admission counts as its first use

    @property
    def busy(self) -> bool:
        return self.loading or self.users > 0


class Residency:
    def __init__(self, device_bytes: int, ram_bytes: int, rules: Rules | None = None) -> None:
        self.rules = rules or Rules()
        self.allocator = ExtentAllocator(device_bytes)
        self.device = Keeper(self.rules.device)
        self.ram = Keeper(self.rules.ram)
        self.ram_bytes = ram_bytes
        self.busy_bytes = 0  # of what is held or on its way
        self._places: dict[str, Place] = {}
        self._at: dict[int, str] = {}  # start -> key
        self._refused: int | None = None  # bytes for which there was no room, and nothing has left since

    def find(self, key: str) -> Tier | None:
        """DEVICE, also when it is on its way there; RAM; or None: it must be read."""
        if key in self._places:
            return Tier.DEVICE
        return Tier.RAM if key in self.ram else None

    def place(self, key: str) -> Place:
        return self._places[key]

    def key_at(self, start: int) -> str:
        """Whose place on the device begins there."""
        return self._at[start]

    # -- the device

    def admit(self, item: Item, now: float, *, pinned: bool = False, spare: Collection[str] = ()) -> Admission | None:
        """Makes room for a block that is not on the device, without the blocks of `spare`, and reserves it.

        None, and nothing changes, when what is on its way, held or pinned leaves no room.
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
        for key in admission.evicted:
            if key in self.ram:
                self.ram.rest(key, now)
        self._places[item.key] = Place(admission.start, size)
        self.busy_bytes += size
        self._at[admission.start] = item.key
        pinned = pinned and _may_pin(self.device, size, self.allocator.capacity)
        self.device.insert(item._replace(size=size), now, pinned=pinned)
        return admission

    def arrived(self, key: str) -> None:
        place = self._places[key]
        place.loading = False
        self._rest(place)

    def hold(self, key: str, now: float) -> None:
        """A request uses it from now on."""
        place = self._places[key]
        if place.fresh:
            self.device.rest(key, now)
        else:
            self.device.touch(key, now)
        self.busy_bytes += 0 if place.busy else place.size
        place.fresh = False
        place.users += 1

    def release(self, key: str, now: float) -> None:
        place = self._places[key]
        place.users -= 1
        self.device.rest(key, now)
        self._rest(place)

    def remove(self, key: str) -> None:
        """It leaves the device for another reason than that another comes."""
        self._forget(key)
        self.device.remove(key)

    # -- RAM

    def keep(self, item: Item, now: float, *, pinned: bool = False) -> list[str] | None:
        """Takes a block into RAM; what left it for that. None when it has no place there."""
        evicted = self.ram.room(item, self.ram_bytes)
        if evicted is None:
            return None
        for key in evicted:
            self.ram.evict(key)
        self.ram.insert(item, now, pinned=pinned and _may_pin(self.ram, item.size, self.ram_bytes))
        return evicted

    # -- what operators change

    def pin(self, key: str, pinned: bool, now: float) -> None:
        """Wherever it is in memory."""
        for keeper, budget in ((self.device, self.allocator.capacity), (self.ram, self.ram_bytes)):
            if key not in keeper:
                continue
            if not pinned:
                keeper.unpin(key, now)
                self._refused = None
            elif _may_pin(keeper, keeper.item(key).size, budget):
                keeper.pin(key)

    def plan(self, rules: Rules | None, device: int | None, ram: int | None, now: float) -> Plan | None:
        """What would go at once under other rules or budgets. None when what must stay would not fit."""
        found = self._change(rules, device, ram, now)
        return None if found is None else _plan(self.device, found.device_keys, self.ram, found.ram_keys)

    def change(self, rules: Rules | None, device: int | None, ram: int | None, now: float) -> Plan | None:
        """Puts other rules and budgets into force; what went for that. None, and nothing changes, when what must stay
        would not fit. The device's budget may change only while nothing is on its way, and then all blocks lie
        elsewhere: `place` says where."""
        found = self._change(rules, device, ram, now)
        if found is None:
            return None
        plan = _plan(self.device, found.device_keys, self.ram, found.ram_keys)
        self.rules = self.rules if rules is None else rules
        self.ram_bytes = self.ram_bytes if ram is None else ram
        self.device, self.ram = found.device, found.ram
        for key in found.device_keys:
            self._forget(key)
            self.device.evict(key)
        for key in found.ram_keys:
            self.ram.evict(key)
        if device is not None:
            self._lay_out(device)
        self._refused = None
        return plan

    def expire(self, now: float) -> Plan:
        """Lets go of what was unused for too long; what that was."""
        device_keys = [key for key in self.device.expired(now) if not self._places[key].busy]
        ram_keys = list(self.ram.expired(now))
        plan = _plan(self.device, device_keys, self.ram, ram_keys)
        for key in device_keys:
            self.remove(key)
        for key in ram_keys:
            self.ram.remove(key)
        return plan

    def check_integrity(self) -> None:
        """Raises AssertionError unless extents, places, keepers and budgets agree."""
        self.allocator.check_integrity()
        self.device.check_integrity()
        self.ram.check_integrity()
        assert set(self.device) == self._places.keys(), "the device holds other blocks than have places"
        assert self._at == {place.start: key for key, place in self._places.items()}, "the index of places is wrong"
        assert self.busy_bytes == sum(p.size for p in self._places.values() if p.busy), "busy bytes drifted"
        for place in self._places.values():
            assert self.allocator.at(place.start) == Span(place.start, place.size, False), "an extent has no block"
            assert place.users >= 0, "released more often than held"
        assert self.device.used_bytes == self.allocator.used_bytes, "an extent leaked"
        assert self.ram.used_bytes <= self.ram_bytes, "the host tier is over its budget"

    # -- how it is done

    def _change(self, rules: Rules | None, device: int | None, ram: int | None, now: float) -> _Change | None:
        device_keeper = self.device if rules is None else self.device.with_rules(rules.device)
        ram_keeper = self.ram if rules is None else self.ram.with_rules(rules.ram)
        capacity = self.allocator.capacity if device is None else ExtentAllocator(device).capacity
        device_keys = device_keeper.unlawful(now, capacity, lambda key: not self._places[key].busy)
        ram_keys = ram_keeper.unlawful(now, self.ram_bytes if ram is None else ram)
        if device_keys is None or ram_keys is None:
            return None
        return _Change(device_keeper, ram_keeper, device_keys, ram_keys)

    def _take_room(self, room: Room, size: int) -> Admission:
        """Evicts what goes, moves what stays in the window to its beginning, and takes the bytes after it."""
        for key in room.evicted:
            self._forget(key)
            self.device.evict(key)
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
        self._places[key].start = target
        return Move(key, span.start, target, span.size)

    def _lay_out(self, capacity: int) -> None:
        """All blocks side by side, in the order in which they lay, in a pool of another size."""
        assert not any(place.loading for place in self._places.values()), "what is on its way cannot be moved"
        self.allocator = ExtentAllocator(capacity)
        at = 0
        keys = [key for _, key in sorted(self._at.items())]
        self._at = {}
        for key in keys:
            place = self._places[key]
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
        place = self._places.pop(key)
        self.busy_bytes -= place.size if place.busy else 0
        del self._at[place.start]
        self.allocator.release(place.start)
        self._refused = None


def _may_pin(keeper: Keeper, size: int, budget: int) -> bool:
    return keeper.pinned_bytes + size <= PINNED_SHARE * budget


def _plan(device: Keeper, device_keys: list[str], ram: Keeper, ram_keys: list[str]) -> Plan:
    return Plan([(k, device.item(k).size) for k in device_keys], [(k, ram.item(k).size) for k in ram_keys])


class _Change(NamedTuple):
    """The keepers under other rules, and what goes from each."""

    device: Keeper
    ram: Keeper
    device_keys: list[str]
    ram_keys: list[str]
