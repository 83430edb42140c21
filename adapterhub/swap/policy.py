"""Decisions of the tiers as pure functions over plain data: no torch, no SQL, no clock.

The same code serves, simulates and is tested. Carrying a decision out is the tiers' work.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Span(NamedTuple):
    """A stretch of the pool: a hole (key None), or a block with the time of its last use; pinned ones stay."""

    start: int
    size: int
    key: str | None = None
    last_use: float = 0.0
    pinned: bool = False


def plan_room(spans: Sequence[Span], size: int) -> list[str] | None:
    """Which blocks to evict so that `size` bytes become free in one piece; [] if a hole is large enough already.

    `spans` tile the pool in order of their start. Of all windows of neighbouring holes and evictable blocks, the one is
    taken whose most recently used block was used longest ago, and among equals the one that evicts the fewest
    bytes: least recently used, aware of where things lie. None when pinned blocks leave no such window.
    """
    best: tuple[float, int, int, int] | None = None
    begin, total = 0, 0
    for end, span in enumerate(spans):
        if span.pinned:
            begin, total = end + 1, 0
            continue
        total += span.size
        while total - spans[begin].size >= size:
            total -= spans[begin].size
            begin += 1
        if total >= size:
            window = [s for s in spans[begin : end + 1] if s.key is not None]
            newest = max((s.last_use for s in window), default=float("-inf"))
            cost = (newest, sum(s.size for s in window), begin, end)
            best = cost if best is None else min(best, cost)
    if best is None:
        return None
    return [s.key for s in spans[best[2] : best[3] + 1] if s.key is not None]


def plan_shrink(sizes: Iterable[tuple[Key, int]], excess: int) -> list[Key]:
    """Which entries to drop, in the order given (least recently used first), until `excess` bytes are free."""
    dropped = []
    for key, size in sizes:
        if excess <= 0:
            break
        dropped.append(key)
        excess -= size
    return dropped
