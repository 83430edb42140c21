"""The search for room in a tier: what goes, and where what stays is moved together, so that a block comes in.

First, what leaves by the policy's order goes, one after the other, until there is enough and what lies between can be
moved together. Where that would move too much, the neighbourhood of those first ones is cleared instead. And where all
else fails, whatever stands in the way is moved, or goes: so that room is found whenever there is any. In a tier where
nothing is moved, neighbours go.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

from adapterhub.swap.allocator import Span
from adapterhub.swap.policies import Item
from adapterhub.swap.policies.keeper import Turn
from adapterhub.swap.windows import Window, cleared, gathered, stretches

if TYPE_CHECKING:
    from adapterhub.swap.space import Space

_ANCHORS = 8  # places around which is looked
_PATIENCE = 32  # victims that may go after there is enough, until it is near enough together
_MOVED_MOST = 2  # times the bytes that come in, that are moved for them


class Room(NamedTuple):
    """These go; then what stays in the window is moved to its beginning. Without a window a hole is large enough."""

    evicted: list[str]
    window: Window | None


class Search:
    """One search, for `size` bytes of `item`, which changes nothing. The blocks of `spare` are not to go; those of
    `released` count as if nobody used them."""

    def __init__(
        self, space: Space, item: Item, size: int, spare: Collection[str], released: Collection[str] = ()
    ) -> None:
        self._space, self._allocator, self._keeper = space, space.allocator, space.keeper
        self._limit = _MOVED_MOST * size if space.moves else 0
        self._owner, self._size, self._spare, self._released = item.owner, size, spare, released
        self._over = self._keeper.over_ceiling(item.owner, size, self._usable)  # they go wherever they are
        self._going: set[int] = {space.places[key].start for key in self._over}
        self._free = self._allocator.free_bytes + sum(space.places[key].size for key in self._over)

    def run(self) -> Room | None:
        """None when what is on its way, held, pinned or spared leaves no room."""
        if not self._over and self._allocator.largest_free >= self._size:
            return Room([], None)
        window = self._gathered()
        if window is None and (window := self._evicting()) is None:
            return None
        keys = [self._space.key_at(start) for start in self._going if window.start <= start < window.end]
        return Room(list(dict.fromkeys([*self._over, *keys])), window)

    def _gathered(self) -> Window | None:
        """What is free already, moved together."""
        over = [self._allocator.at(start) for start in self._going]
        found = [w for span in [*over, *self._allocator.largest_holes(_ANCHORS)] if span and (w := self._around(span))]
        return min(found, key=lambda window: window.moved, default=None)

    def _evicting(self) -> Window | None:
        patience, anchors = _PATIENCE, []
        for key in self._keeper.victims(self._owner, self._usable, self._over):
            place = self._space.places[key]
            span = Span(place.start, place.size, False)
            anchors.append(span)
            self._going.add(place.start)
            self._free += place.size
            if (window := self._around(span)) is not None:
                return window
            patience -= self._free >= self._size
            if not patience:
                break
        if self._free < self._size:
            return None
        return self._cleared(anchors[:_ANCHORS]) or (self._swept() if self._space.moves else self._cleared_anywhere())

    def _around(self, span: Span) -> Window | None:
        if self._free < self._size:
            return None
        return gathered(self._allocator, span, self._size, self._going.__contains__, self._is_fixed, self._limit)

    def _cleared(self, anchors: list[Span]) -> Window | None:
        """The neighbours of one of those that go first go with it: where the one that would go last is the first."""
        found = [c for span in anchors if (c := cleared(self._allocator, span, self._size, self._loss)) is not None]
        if not found:
            return None
        best = min(found, key=lambda c: (c.worst, c.lost))
        self._going = {*best.gone, *(self._space.places[key].start for key in self._over)}
        return best.window

    def _cleared_anywhere(self) -> Window | None:
        """Where nothing may move: of all stretches between blocks that stay. Slow, and right, as below."""
        anchors = []
        for stretch in stretches(self._allocator, lambda start: self._loss(start) is None):
            if sum(span.size for span in stretch) >= self._size:
                anchors.append(next(span for span in stretch if not span.free))
        return self._cleared(anchors)

    def _swept(self) -> Window | None:
        """A whole stretch between blocks that stay where they are: as many of it go as must, the others are moved.
        Slow, and right: where this finds no room there is none."""
        over, best = set(self._over), None
        for stretch in stretches(self._allocator, self._is_fixed):
            keys = {self._space.key_at(span.start): span.size for span in stretch if not span.free}
            free = sum(s.size for s in stretch) - sum(size for key, size in keys.items() if key not in over)
            most = free + sum(size for key, size in keys.items() if key not in over and self._may_go(key))
            if most >= self._size and (best is None or free > best[0]):
                best = free, stretch, keys
        if best is None:
            return None
        free, stretch, keys = best
        self._going = {self._space.places[key].start for key in self._over}
        for key in self._keeper.victims(self._owner, lambda key: key in keys and self._usable(key), self._over):
            if free >= self._size:
                break
            self._going.add(self._space.places[key].start)
            free += keys[key]
        return Window(stretch[0].start, stretch[-1].end, 0)

    def _usable(self, key: str) -> bool:
        place = self._space.places[key]
        idle = not place.busy or (key in self._released and not place.loading)
        return idle and key not in self._spare

    def _may_go(self, key: str) -> bool:
        return self._usable(key) and not self._keeper.is_pinned(key)

    def _is_fixed(self, start: int) -> bool:
        return self._space.places[self._space.key_at(start)].loading

    def _loss(self, start: int) -> Turn | None:
        key = self._space.key_at(start)
        return self._keeper.turn(key, self._owner) if self._may_go(key) else None
