"""The host tier: the blocks that RAM keeps, in the arena, and the host memory that blocks go through on their way to
the device. What RAM keeps, and what it lets go of for that, `Residency` decides.

A block that is being read into RAM, or copied from there, counts as in use: its place is nobody else's until that has
ended.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from adapterhub.swap.arena import Arena
from adapterhub.swap.block import BlockMeta
from adapterhub.swap.copies import Copies
from adapterhub.swap.hold import Resident
from adapterhub.swap.residency import Residency, item_of


@dataclass
class HostBlock:
    meta: BlockMeta
    payload: torch.Tensor
    condemned: bool = False  # it goes as soon as no copy of it is under way


class Berth(NamedTuple):
    """Where in host memory a block lies, or is to be read to, until it has been copied to the device."""

    payload: torch.Tensor | None  # None: there is no place for it here
    meta: BlockMeta | None = None  # None: it is to be read
    kept: bool = False  # by RAM, once it is read
    staged: int | None = None  # else, where it passes through


class HostTier:
    """Only the engine's thread may call this."""

    def __init__(self, residency: Residency, ram_bytes: int, dtype: torch.dtype, device: torch.device, copies: Copies):
        self._residency, self._dtype, self._device, self._copies = residency, dtype, device, copies
        self._arena = self._new_arena(ram_bytes)
        self._blocks: dict[str, HostBlock] = {}
        self.evictions = 0  # for others, by rules or for another budget

    def __contains__(self, digest: str) -> bool:
        return digest in self._blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def payload(self, digest: str) -> torch.Tensor:
        return self._blocks[digest].payload

    @property
    def is_locked(self) -> bool:
        """Whether beginning a copy from here holds up nobody."""
        return self._arena.is_locked

    # -- while a block is on its way to the device

    def lend(self, resident: Resident) -> Berth:
        """The block as RAM has it, else a place to read it to, which is its own until `take_back`."""
        digest, space = resident.digest, self._residency.arena
        if (block := self._blocks.get(digest)) is not None:
            space.take(digest)
            return Berth(block.payload, block.meta, kept=True)
        item = item_of(digest, resident.nbytes, resident.ref.owner)
        admission = self._residency.keep(item, time.monotonic(), pinned=resident.pinned) if resident.keep else None
        if admission is not None:
            self.drop(admission.evicted)
            space.take(digest)
            return Berth(self._arena.view(admission.start, resident.nbytes), kept=True)
        start = self._arena.stage(resident.nbytes) if self._copies.queues else None
        return Berth(None) if start is None else Berth(self._arena.view(start, resident.nbytes), staged=start)

    def has_read(self, resident: Resident, berth: Berth, meta: BlockMeta) -> None:
        """The block lies in its berth now."""
        if berth.kept and resident.digest not in self._blocks:
            assert berth.payload is not None
            self._blocks[resident.digest] = HostBlock(meta, berth.payload, condemned=not resident.keep)

    def take_back(self, digest: str, berth: Berth) -> None:
        """The block has been copied to the device, or it could not be read."""
        if berth.staged is not None:
            self._arena.unstage(berth.staged)
        if not berth.kept:
            return
        self._residency.arena.leave(digest)
        if digest not in self._blocks:
            self._residency.arena.remove(digest)
        elif self._blocks[digest].condemned:
            self.remove(digest)

    # -- leaving

    def remove(self, digest: str) -> None:
        """It leaves RAM, if it is there, for another reason than that another comes."""
        block = self._blocks.get(digest)
        if block is None:
            return
        if self._residency.arena.places[digest].busy:
            block.condemned = True
        else:
            del self._blocks[digest]
            self._residency.arena.remove(digest)

    def drop(self, digests: Iterable[str]) -> None:
        """Forgets what the residency has let go of."""
        for digest in digests:
            del self._blocks[digest]
            self.evictions += 1

    # -- another size

    def prepared(self, ram_bytes: int) -> Arena:
        """What could take the arena's place. Raises BadRequest when there is no such memory."""
        return self._new_arena(ram_bytes)

    def move_to(self, arena: Arena) -> None:
        """Goes on in `arena`, where the residency has laid everything out anew. Nothing may be on its way."""
        for digest, block in self._blocks.items():
            payload = arena.view(self._residency.arena.places[digest].start, block.payload.nbytes)
            block.payload = payload.copy_(block.payload)
        self._arena.close()
        self._arena = arena

    def check_integrity(self, on_their_way: int) -> None:
        """Raises AssertionError unless what is here is what the residency says, while so many are on their way."""
        places = self._residency.arena.places
        assert self._blocks.keys() <= places.keys(), "RAM holds a block that has no place there"
        unread = [digest for digest in places if digest not in self._blocks]
        assert all(places[digest].busy for digest in unread), "a place in RAM has no block"
        assert sum(place.users for place in places.values()) <= on_their_way, "a place in RAM is still lent"
        assert self._arena.capacity == self._residency.arena.allocator.capacity, "RAM has another size than it says"
        for digest, block in self._blocks.items():
            expected = self._arena.view(places[digest].start, block.payload.nbytes)
            assert block.payload.data_ptr() == expected.data_ptr(), "a block lies elsewhere in RAM than it says"
        assert on_their_way or not self._arena.staged_bytes, "a place to pass through is still lent"

    def close(self) -> None:
        self._arena.close()

    def _new_arena(self, ram_bytes: int) -> Arena:
        return Arena(ram_bytes, self._copies.staging_bytes, self._dtype, self._device)
