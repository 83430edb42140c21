"""Brings adapters to the device before their requests come into a step: those that come next are pinned, those further
back in the queue, and those that somebody hinted at, are read while the readers have nothing else to do.

Where the pool is full of what is in use, who came first is served first, but for two things. An owner who has nothing
on the device is made room for by owners with several adapters there, as for a place in the batch (`scheduler.py`). And
who asks for what has its place already goes past the one that waits for room, unless that could keep it from ever
finding any.
"""

from __future__ import annotations

from collections import deque
from itertools import islice

from adapterhub.base.scheduler import Scheduler, Sequence
from adapterhub.errors import HubError
from adapterhub.swap.ref import AdapterRef
from adapterhub.swap.tiers import Tiers

_AHEAD = 3  # times the largest batch: how far into the queue adapters are read ahead
_HINTS = 256  # the oldest are forgotten


class Ahead:
    """Only the engine's thread may call this."""

    def __init__(self, scheduler: Scheduler, tiers: Tiers) -> None:
        self._scheduler, self._tiers = scheduler, tiers
        self._hints: deque[AdapterRef] = deque(maxlen=_HINTS)  # what somebody may ask for soon

    def hint(self, adapter: AdapterRef) -> None:
        """Somebody may ask for it soon."""
        self._hints.append(adapter)

    def bring(self) -> list[tuple[Sequence, HubError]]:
        """Sends for all that should be on its way; returns the sequences whose adapters do not come, and why."""
        failed: dict[Sequence, HubError] = {}
        while (refused := self._pin_in_turn(failed)) is not None and self._make_way(refused):
            pass
        if refused is None:
            self._prefetch()
        return list(failed.items())

    def _pin_in_turn(self, failed: dict[Sequence, HubError]) -> Sequence | None:
        """Pins what comes next; the first that finds no room, if any."""
        refused: Sequence | None = None
        passing: _Passing | None = None
        for sequence in self._scheduler.look_ahead():
            adapter = sequence.request.adapter
            if passing is not None and adapter is not None and sequence.hold is None and not passing.lets(sequence):
                continue
            try:
                if not self._pin(sequence) and refused is None and adapter is not None:
                    refused, passing = sequence, _Passing(self._scheduler, self._tiers, sequence, adapter)
            except HubError as error:
                failed[sequence] = error
        return refused

    def _make_way(self, newcomer: Sequence) -> bool:
        """Gives the newcomer's adapter the room of others, if its owner has none on the device and theirs suffices."""
        adapter, others = newcomer.request.adapter, self._who_give_way(newcomer)
        assert adapter is not None, "it needs no room"
        if not others or not self._tiers.would_fit(adapter, [s.hold for s in others if s.hold is not None]):
            return False
        for other in others:
            if other in self._scheduler.running:
                self._scheduler.preempt(other)
            if other.hold is not None:
                self._tiers.release(other.hold)
                other.hold = None
            self._tiers.poll()  # what came from the store, and nobody waits for any more, goes
            if self._pin(newcomer):
                return True
        return False

    def _who_give_way(self, newcomer: Sequence) -> list[Sequence]:
        """Those behind it in the queue, the last one first, then those that would give their place in the batch up;
        each owner keeps one, and what is being read is not given up. Nobody, for an owner who has one already."""
        keeps = {s.owner for s in self._scheduler.running}
        if newcomer.owner in keeps:
            return []
        waiting, is_behind = list[Sequence](), False
        for sequence in self._scheduler.waiting():
            if sequence is newcomer:
                is_behind = True
            elif (hold := sequence.hold) is not None:
                if is_behind and sequence.owner in keeps and (hold.ready or hold.crowded):
                    waiting.append(sequence)
                keeps.add(sequence.owner)
        if newcomer.owner in keeps:
            return []
        return [*reversed(waiting), *self._scheduler.surplus(lambda s: s.hold is not None)]

    def _pin(self, sequence: Sequence) -> bool:
        """False when there is no room for its adapter until others release theirs. Raises what its load met."""
        adapter = sequence.request.adapter
        if adapter is not None and sequence.hold is None:
            sequence.hold = self._tiers.acquire(adapter)
            if sequence.hold is None:
                return False
        if sequence.hold is not None and sequence.hold.error is not None:
            raise sequence.hold.error
        return sequence.hold is None or not sequence.hold.crowded

    def _prefetch(self) -> None:
        """It takes nothing from anybody who is in the queue."""
        wanted: dict[str, AdapterRef] = {}
        if self._tiers.readers_idle and self._scheduler.num_waiting:
            batch = self._scheduler.max_batch
            for sequence in islice(self._scheduler.waiting(), batch, _AHEAD * batch):
                if (adapter := sequence.request.adapter) is not None:
                    wanted[adapter.digest] = adapter
        for adapter in wanted.values():
            if not self._tiers.prefetch(adapter, wanted.keys()):
                return
        while self._hints and self._tiers.readers_idle:
            self._tiers.prefetch(self._hints.popleft(), wanted.keys())


class _Passing:
    """Who may go past the `first` that waits for room for its `adapter`.

    Those who came before it end some day: who uses what one of them uses takes no other place. All others leave it
    room: together with what those who came later use, it fits.
    """

    def __init__(self, scheduler: Scheduler, tiers: Tiers, first: Sequence, adapter: AdapterRef) -> None:
        self._tiers, self._first, self._adapter = tiers, first, adapter
        self._before, self._after = set[str](), set[str]()
        for sequence in scheduler.find(lambda s: s.hold is not None):
            self._note(sequence)

    def lets(self, sequence: Sequence) -> bool:
        """Whether it may; then it does."""
        assert sequence.request.adapter is not None
        digest = sequence.request.adapter.digest
        if not self._tiers.has_place(digest):
            return False
        if digest not in self._before and not self._tiers.would_fit_beside(self._adapter, {*self._after, digest}):
            return False
        self._note(sequence)
        return True

    def _note(self, sequence: Sequence) -> None:
        assert sequence.request.adapter is not None
        came_before = sequence.arrived <= self._first.arrived
        (self._before if came_before else self._after).add(sequence.request.adapter.digest)
