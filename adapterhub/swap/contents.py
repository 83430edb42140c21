"""The blocks that are in the pool and in RAM, or on their way there: what `Residency` decides of them is done here.

Everything happens on the engine's thread, between two of its steps; reading threads fill what was set aside.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection
from fractions import Fraction

import torch

from adapterhub.config import format_bytes
from adapterhub.errors import BadRequest
from adapterhub.swap.allocator import aligned
from adapterhub.swap.copies import Copies
from adapterhub.swap.hold import Placed, Resident
from adapterhub.swap.host import HostTier
from adapterhub.swap.policies import Rules
from adapterhub.swap.pool import Extent, Pool
from adapterhub.swap.residency import Plan, Residency, item_of
from adapterhub.swap.space import PINNED_SHARE

log = logging.getLogger(__name__)


class Contents:
    def __init__(self, pool: Pool, ram_bytes: int, rules: Rules | None, copies: Copies) -> None:
        self.pool = pool
        self.residency = Residency(pool.capacity, ram_bytes, rules)
        self.residents: dict[str, Resident] = {}  # those that have a place in the pool
        self.host = HostTier(self.residency, ram_bytes, pool.dtype, pool.device, copies)
        self.evictions = 0  # from the device, for others, by rules or for another budget
        self.moved_bytes = 0  # within the pool
        self.largest = 0  # bytes of the largest that ever came

    # -- coming and going

    def admit(self, resident: Resident, spare: Collection[str]) -> bool:
        """Gives it a place in the pool, which others make room for. False when there is none."""
        now = time.monotonic()
        ref = resident.ref
        item = item_of(ref.digest, ref.nbytes, ref.owner)
        admission = self.residency.admit(item, now, pinned=resident.pinned, spare=spare)
        if admission is None:
            return False
        for digest in admission.evicted:
            del self.residents[digest]
        self.evictions += len(admission.evicted)
        for move in admission.moves:
            moved = self.residents[move.key]
            self.pool.move(self.pool.extent(move.source, moved.nbytes), self.extent(moved))
            self.replace(moved)
            self.moved_bytes += moved.nbytes
        if ref.digest in self.host:
            self.residency.ram.touch(ref.digest, now)
        self.residents[ref.digest] = resident
        self.largest = max(self.largest, self.residency.place(ref.digest).size)
        return True

    def arrived(self, resident: Resident, placed: Placed) -> None:
        self.residency.arrived(resident.digest)
        resident.placed = placed

    def remove(self, resident: Resident) -> None:
        """Takes it out of the pool, for another reason than that another comes."""
        del self.residents[resident.digest]
        self.residency.remove(resident.digest)
        if resident.digest in self.host:
            self.residency.ram.rest(resident.digest, time.monotonic())

    def drop(self, plan: Plan) -> None:
        """Forgets what the residency has let go of."""
        for digest, _ in plan.device:
            del self.residents[digest]
        self.evictions += len(plan.device)
        self.host.drop(digest for digest, _ in plan.ram)

    def extent(self, resident: Resident) -> Extent:
        return self.pool.extent(self.residency.place(resident.digest).start, resident.nbytes)

    # -- what operators change

    def plan(self, rules: Rules | None, device: int | None, ram: int | None, now: float | None = None) -> Plan:
        """What would go at once, or at a time. Raises BadRequest when what is pinned or in use would not fit."""
        return self._possible(self.residency.plan(rules, device, ram, _or_now(now)))

    def set_rules(self, rules: Rules) -> None:
        self.drop(self._possible(self.residency.change(rules, None, None, time.monotonic())))

    def change(self, device: int | None, ram: int | None, now: float | None = None) -> None:
        """Puts other budgets into force: what goes is forgotten, and what stays has another place, where it is to be
        copied. Raises BadRequest as `plan` does."""
        self.drop(self._possible(self.residency.change(None, device, ram, _or_now(now))))

    def replace(self, resident: Resident) -> None:
        """Its holds find it in its new place."""
        assert resident.placed is not None, "what is on its way stays where it is"
        extent = self.extent(resident)
        resident.placed = resident.placed.moved(self.pool.view(extent), extent.start)

    def in_host_memory(self, digest: str) -> torch.Tensor:
        """A block that is on the device, as RAM has it, or copied there."""
        if digest in self.host:
            return self.host.payload(digest)
        return self.pool.view(self.extent(self.residents[digest])).to("cpu", copy=True)

    @property
    def least_bytes(self) -> int:
        """Of a pool that holds what stays, with room beside the pins for the largest that ever came."""
        pinned = self.residency.device.pinned_bytes
        return max(self.staying_bytes, pinned + self.largest, aligned(math.ceil(pinned / PINNED_SHARE)))

    @property
    def staying_bytes(self) -> int:
        """On the device, in use or pinned."""
        places = ((self.residency.place(digest), digest) for digest in self.residents)
        return sum(p.size for p, digest in places if p.busy or self.residency.device.is_pinned(digest))

    def check_integrity(self, on_their_way: int) -> None:
        """Raises AssertionError unless what is here is what the residency says, when so many blocks are on their way
        from host memory."""
        self.residency.check_integrity()
        self.host.check_integrity(on_their_way)
        assert set(self.residency.device) == self.residents.keys(), "a block has a place and no resident"
        for digest, resident in self.residents.items():
            assert self.residency.place(digest).users == resident.pins, "a block is in use by others than hold it"

    def _possible(self, plan: Plan | None) -> Plan:
        if plan is None:
            raise BadRequest(
                f"What is pinned or in use would not fit: {format_bytes(self.staying_bytes)} on the device, "
                f"{format_bytes(self.residency.ram.pinned_bytes)} in RAM, of which pins may hold "
                f"{Fraction(PINNED_SHARE)} each. Choose more, or unpin some of it."
            )
        return plan


def _or_now(time_or_none: float | None) -> float:
    return time.monotonic() if time_or_none is None else time_or_none
