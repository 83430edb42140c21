"""Which block is in which tier in memory, and what goes or moves so that another comes: decisions alone.

Plain data without torch, SQL or a clock: sizes are bytes, times come from the caller and never go back. `Tiers` carries
out what is decided here, and a simulator replays a trace over it, so that both do the same.

The life of a block on the device: `admit` (room is made, and it is on its way), `arrived`, `hold` and `release` for
each request that uses it, `remove`. What is on its way stays where it is; what is held may be moved, not evicted. In
RAM it has a place of its own (`keep`), from which it does not move: a GPU may be reading it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from adapterhub.swap.allocator import ExtentAllocator, aligned
from adapterhub.swap.policies import Item, Keeper, Rules
from adapterhub.swap.ref import Tier
from adapterhub.swap.space import Admission, Change, Place, Space

_LOAD_OVERHEAD = 2 * 1024**2  # a load takes as long as reading so many bytes more


def item_of(digest: str, size: int, owner: str) -> Item:
    """What a tier in memory keeps; its cost is that of reading it again."""
    return Item(digest, size, owner, float(size + _LOAD_OVERHEAD))


class Plan(NamedTuple):
    """What would go, and how many bytes each has: of the device, and of RAM."""

    device: list[tuple[str, int]]
    ram: list[tuple[str, int]]


class Residency:
    def __init__(self, device_bytes: int, ram_bytes: int, rules: Rules | None = None) -> None:
        self.rules = rules or Rules()
        self.pool = Space(device_bytes, self.rules.device, moves=True)
        self.arena = Space(ram_bytes, self.rules.ram, moves=False)

    @property
    def allocator(self) -> ExtentAllocator:
        """Of the device."""
        return self.pool.allocator

    @property
    def device(self) -> Keeper:
        return self.pool.keeper

    @property
    def ram(self) -> Keeper:
        return self.arena.keeper

    def find(self, key: str) -> Tier | None:
        """DEVICE, also when it is on its way there; RAM; or None: it must be read."""
        if key in self.device:
            return Tier.DEVICE
        return Tier.RAM if key in self.ram else None

    def place(self, key: str) -> Place:
        """On the device."""
        return self.pool.places[key]

    # -- the device

    def admit(self, item: Item, now: float, *, pinned: bool = False, spare: Collection[str] = ()) -> Admission | None:
        """Makes room for a block that is not on the device, without the blocks of `spare`, and reserves it.

        None, and nothing changes, when what is on its way, held or pinned leaves no room.
        """
        admission = self.pool.admit(item, now, pinned=pinned, spare=spare, loading=True)
        for key in admission.evicted if admission else ():
            if key in self.ram:
                self.ram.rest(key, now)
        return admission

    def fits(self, item: Item, released: Collection[str]) -> bool:
        """Whether a block that is not on the device would find room there, if no request held those of `released`."""
        return self.pool.fits(item, released)

    def fits_beside(self, size: int, keys: Collection[str]) -> bool:
        """Whether `size` bytes find room while those blocks and what is pinned stay, and all else may go."""
        free = [key for key in keys if key in self.device and not self.device.is_pinned(key)]
        stays = self.device.pinned_bytes + sum(self.place(key).size for key in free)
        return stays + aligned(max(size, 1)) <= self.allocator.capacity

    def arrived(self, key: str) -> None:
        self.pool.arrived(key)

    def hold(self, key: str, now: float) -> None:
        """A request uses it from now on."""
        place = self.pool.take(key)
        if place.fresh:
            self.device.rest(key, now)
        else:
            self.device.touch(key, now)
        place.fresh = False

    def release(self, key: str, now: float) -> None:
        self.device.rest(key, now)
        self.pool.leave(key)

    def remove(self, key: str) -> None:
        """It leaves the device for another reason than that another comes."""
        self.pool.remove(key)

    # -- RAM

    def keep(self, item: Item, now: float, *, pinned: bool = False) -> Admission | None:
        """Takes a block into RAM. None when it has no place there."""
        return self.arena.admit(item, now, pinned=pinned)

    # -- what operators change

    def pin(self, key: str, pinned: bool, now: float) -> None:
        """Wherever it is in memory."""
        for space in (self.pool, self.arena):
            if key in space.places:
                space.pin(key, pinned, now)

    def plan(self, rules: Rules | None, device: int | None, ram: int | None, now: float) -> Plan | None:
        """What would go at once under other rules or budgets. None when what must stay would not fit."""
        changes = self._changes(rules, device, ram, now)
        return None if changes is None else Plan(*(change.sizes for change in changes))

    def change(self, rules: Rules | None, device: int | None, ram: int | None, now: float) -> Plan | None:
        """Puts other rules and budgets into force; what went for that. None, and nothing changes, when what must stay
        would not fit. A budget may change only while nothing is on its way, and then all blocks of the tier lie
        elsewhere."""
        changes = self._changes(rules, device, ram, now)
        if changes is None:
            return None
        plan = Plan(*(change.sizes for change in changes))
        self.rules = rules or self.rules
        for space, change, capacity in zip((self.pool, self.arena), changes, (device, ram), strict=True):
            space.carry_out(change, capacity)
        return plan

    def expire(self, now: float) -> Plan:
        """Lets go of what was unused for too long; what that was."""
        return Plan(self.pool.expire(now), self.arena.expire(now))

    def check_integrity(self) -> None:
        """Raises AssertionError unless extents, places, keepers and budgets agree."""
        self.pool.check_integrity()
        self.arena.check_integrity()

    def _changes(
        self, rules: Rules | None, device: int | None, ram: int | None, now: float
    ) -> tuple[Change, Change] | None:
        """Of the device, and of RAM."""
        on_device = self.pool.plan(rules.device if rules else None, device, now)
        in_ram = self.arena.plan(rules.ram if rules else None, ram, now)
        return None if on_device is None or in_ram is None else (on_device, in_ram)
