"""The blocks that are in the pool and in RAM, or on their way there: what `Residency` decides of them is done here.

Everything happens on the engine's thread, between two of its steps; reading threads fill what was set aside.
"""

from __future__ import annotations

import time
from collections.abc import Collection

import torch

from adapterhub.config import format_bytes
from adapterhub.errors import BadRequest
from adapterhub.swap.hold import Placed, Resident
from adapterhub.swap.loader import HostBlock
from adapterhub.swap.memory import available_bytes
from adapterhub.swap.policies import Rules
from adapterhub.swap.pool import Extent, Pool
from adapterhub.swap.residency import Plan, Residency, item_of


class Contents:
    def __init__(self, pool: Pool, ram_bytes: int, rules: Rules | None) -> None:
        self.pool = pool
        self.residency = Residency(pool.capacity, ram_bytes, rules)
        self.residents: dict[str, Resident] = {}  # those that have a place in the pool
        self.host: dict[str, HostBlock] = {}
        self.evictions = 0  # from the device, for others, by rules or for another budget
        self.ram_evictions = 0
        self.moved_bytes = 0  # within the pool

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
            self._replace(moved, self.extent(moved))
            self.moved_bytes += moved.nbytes
        if ref.digest in self.host:
            self.residency.ram.touch(ref.digest, now)
        self.residents[ref.digest] = resident
        return True

    def arrived(self, resident: Resident, placed: Placed) -> None:
        self.residency.arrived(resident.digest)
        resident.placed = placed

    def keep_in_ram(self, resident: Resident, block: HostBlock) -> None:
        item = item_of(resident.digest, block.nbytes, resident.ref.owner)
        evicted = self.residency.keep(item, time.monotonic(), pinned=resident.pinned)
        if evicted is not None:
            self.host[resident.digest] = block
            for digest in evicted:
                del self.host[digest]
            self.ram_evictions += len(evicted)

    def remove(self, resident: Resident) -> None:
        """Takes it out of the pool, for another reason than that another comes."""
        del self.residents[resident.digest]
        self.residency.remove(resident.digest)
        if resident.digest in self.host:
            self.residency.ram.rest(resident.digest, time.monotonic())

    def remove_from_ram(self, digest: str) -> None:
        if self.host.pop(digest, None) is not None:
            self.residency.ram.remove(digest)

    def drop(self, plan: Plan) -> None:
        """Forgets what the residency has let go of."""
        for digest, _ in plan.device:
            del self.residents[digest]
        for digest, _ in plan.ram:
            del self.host[digest]
        self.evictions += len(plan.device)
        self.ram_evictions += len(plan.ram)

    def extent(self, resident: Resident) -> Extent:
        return self.pool.extent(self.residency.place(resident.digest).start, resident.nbytes)

    # -- what operators change

    def plan(self, rules: Rules | None, device: int | None, ram: int | None) -> Plan:
        """What would go at once. Raises BadRequest when what is pinned or in use would not fit."""
        return self._possible(self.residency.plan(rules, device, ram, time.monotonic()))

    def set_rules(self, rules: Rules) -> None:
        self.drop(self._possible(self.residency.change(rules, None, None, time.monotonic())))

    def set_budgets(self, device: int | None, ram: int | None) -> None:
        """Nothing may be on its way. Another pool takes the place of this one, and both are there while blocks are
        copied.

        Raises BadRequest, and changes nothing, when there is no memory for that, or what must stay would not fit.
        """
        memory = None if device is None else self._memory(device, ram)
        sources = {digest: self.extent(resident) for digest, resident in self.residents.items()}
        self.drop(self._possible(self.residency.change(None, device, ram, time.monotonic())))
        if memory is not None:
            targets = {digest: self.extent(resident) for digest, resident in self.residents.items()}
            self.pool.adopt(memory, [(sources[digest], extent) for digest, extent in targets.items()])
            for digest, extent in targets.items():
                self._replace(self.residents[digest], extent)

    def check_integrity(self) -> None:
        """Raises AssertionError unless what is here is what the residency says."""
        self.residency.check_integrity()
        assert set(self.residency.device) == self.residents.keys(), "a block has a place and no resident"
        assert set(self.residency.ram) == self.host.keys(), "RAM holds other blocks than it says"
        for digest, resident in self.residents.items():
            assert self.residency.place(digest).users == resident.pins, "a block is in use by others than hold it"

    def _memory(self, device: int, ram: int | None) -> torch.Tensor:
        """For a pool of another size."""
        try:
            memory = self.pool.memory(device)
        except torch.OutOfMemoryError as error:
            raise _no_room(device, "no room for a second pool") from error
        if self.pool.device.type == "cpu":  # its pages are taken as blocks come, and only then would it show
            gone = sum(size for _, size in self.plan(None, device, ram).device)
            needed, available = self.residency.allocator.used_bytes - gone, available_bytes()
            if available is not None and needed > available:
                raise _no_room(
                    device,
                    f"{format_bytes(available)} of memory left, and the blocks that stay need {format_bytes(needed)}",
                )
        return memory

    def _replace(self, resident: Resident, extent: Extent) -> None:
        """Its holds find it in its new place."""
        assert resident.placed is not None, "what is on its way stays where it is"
        resident.placed = resident.placed.moved(self.pool.view(extent), extent.start)

    def _possible(self, plan: Plan | None) -> Plan:
        if plan is None:
            places = ((self.residency.place(digest), digest) for digest in self.residents)
            held = sum(p.size for p, digest in places if p.busy or self.residency.device.is_pinned(digest))
            raise BadRequest(
                f"What is pinned or in use would not fit: {format_bytes(held)} on the device, "
                f"{format_bytes(self.residency.ram.pinned_bytes)} in RAM. Choose more, or unpin some of it."
            )
        return plan


def _no_room(device: int, why: str) -> BadRequest:
    return BadRequest(
        f"A pool of {format_bytes(device)} has to be filled beside the one that it replaces, and there is {why}. "
        "Choose less, or restart the server with the new budget."
    )
