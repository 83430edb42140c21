"""Where in the pool room can be made, as plain integers: windows of neighbouring spans in which blocks are moved
together, or go.

A window begins around one span and grows to both sides, so that its cost is that of what it covers, however many blocks
the pool holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from adapterhub.swap.allocator import ExtentAllocator, Span

_MOST_SPANS = 64  # that are looked at to move blocks together


class Window(NamedTuple):
    """[start, end) of the pool, in which the blocks that do not go, `moved` bytes of them, move to the beginning."""

    start: int
    end: int
    moved: int


class Cleared(NamedTuple):
    """A window that all blocks leave: where they begin, the greatest loss among them, and their bytes."""

    window: Window
    gone: list[int]
    worst: Any
    lost: int


def gathered(
    allocator: ExtentAllocator,
    around: Span,
    size: int,
    goes: Callable[[int], bool],
    fixed: Callable[[int], bool],
    limit: int,
) -> Window | None:
    """A window around a span in which holes and blocks that go have `size` bytes, moving at most `limit` bytes.

    `goes` and `fixed` say of the block that begins at a byte whether it goes, and whether it must stay where it is.
    """
    start, end, found, moved = around.start, around.end, around.size, 0
    for _ in range(_MOST_SPANS):
        if found >= size:
            return _trimmed(allocator, start, end, goes)
        sides = [side for side in (allocator.before(start), allocator.at(end)) if side is not None]
        free = [side for side in sides if side.free or goes(side.start)]
        side = min(free or [s for s in sides if not fixed(s.start)], key=lambda s: s.size, default=None)
        if side is None:
            return None
        if free:
            found += side.size
        else:
            moved += side.size
            if moved > limit:
                return None
        start, end = min(start, side.start), max(end, side.end)
    return None


def cleared(allocator: ExtentAllocator, around: Span, size: int, loss: Callable[[int], Any | None]) -> Cleared | None:
    """The neighbours of a block that go with it so that `size` bytes are free in one piece.

    `loss` is what is lost with the block that begins at a byte; None for one that must stay.
    """
    start, end, gone, lost, worst = around.start, around.end, [around.start], around.size, loss(around.start)
    while end - start < size:
        sides = [side for side in (allocator.before(start), allocator.at(end)) if side is not None]
        side = next((s for s in sides if s.free), None)
        if side is None:
            losses = [(found, s) for s in sides if (found := loss(s.start)) is not None]
            if not losses:
                return None
            found, side = min(losses)
            gone.append(side.start)
            lost += side.size
            worst = max(worst, found)
        start, end = min(start, side.start), max(end, side.end)
    return Cleared(Window(*_with_holes(allocator, start, end), 0), gone, worst, lost)


def stretches(allocator: ExtentAllocator, fixed: Callable[[int], bool]) -> Iterator[list[Span]]:
    """The spans between blocks that must stay where they are, stretch by stretch, over the whole pool."""
    spans: list[Span] = []
    at = 0
    while (span := allocator.at(at)) is not None:
        at = span.end
        if span.free or not fixed(span.start):
            spans.append(span)
        elif spans:
            yield spans
            spans = []
    if spans:
        yield spans


def _trimmed(allocator: ExtentAllocator, start: int, end: int, goes: Callable[[int], bool]) -> Window:
    """Without blocks at its edges that would move for nothing, and with the holes beside it."""
    while (first := allocator.at(start)) is not None and not first.free and not goes(first.start):
        start = first.end
    while (last := allocator.before(end)) is not None and not last.free and not goes(last.start):
        end = last.start
    start, end = _with_holes(allocator, start, end)
    moved, at = 0, start
    while at < end and (span := allocator.at(at)) is not None:
        moved += 0 if span.free or goes(at) else span.size
        at = span.end
    return Window(start, end, moved)


def _with_holes(allocator: ExtentAllocator, start: int, end: int) -> tuple[int, int]:
    before, after = allocator.before(start), allocator.at(end)
    return before.start if before and before.free else start, after.end if after and after.free else end
