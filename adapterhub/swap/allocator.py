"""Extents of the pool, as plain integers. Used by what serves, by the simulator and by tests alike.

Nothing takes longer because there are more extents, but for `check_integrity`.
"""

from __future__ import annotations

from typing import NamedTuple

from sortedcontainers import SortedList

ALIGNMENT = 256  # bytes


def aligned(size: int) -> int:
    """`size` rounded up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Span(NamedTuple):
    """A stretch [start, start + size) of the pool that is one hole or one extent."""

    start: int
    size: int
    free: bool

    @property
    def end(self) -> int:
        return self.start + self.size


class ExtentAllocator:
    """Hands out non-overlapping, aligned extents [start, start + size) of [0, capacity), in bytes.

    Best fit, so that small blocks do not cut up the room that large ones need; neighbours merge when freed.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity // ALIGNMENT * ALIGNMENT
        self.used_bytes = 0
        self._used: dict[int, int] = {}  # start -> size
        self._free: dict[int, int] = {}
        self._starts: dict[int, int] = {}  # end -> start, of used and free ones
        self._holes = SortedList()  # (size, start)
        if self.capacity:
            self._add_hole(0, self.capacity)

    @property
    def free_bytes(self) -> int:
        return self.capacity - self.used_bytes

    @property
    def largest_free(self) -> int:
        return self._holes[-1][0] if self._holes else 0

    @property
    def free_extents(self) -> list[tuple[int, int]]:
        """(start, size) of each hole, by start."""
        return sorted(self._free.items())

    def largest_holes(self, count: int) -> list[Span]:
        return [Span(start, size, True) for size, start in self._holes[-count:]]

    def allocate(self, size: int) -> int | None:
        """The start of a fresh extent of at least `size` bytes, or None when no hole is large enough."""
        size = aligned(max(size, 1))
        index = self._holes.bisect_left((size, -1))
        if index == len(self._holes):
            return None
        _, start = self._holes[index]
        self.allocate_at(start, size)
        return start

    def allocate_at(self, start: int, size: int) -> None:
        """Takes `size` bytes, aligned, from the beginning of the hole at `start`."""
        hole = self._free[start]
        assert size <= hole, f"the hole at byte {start} has {hole} bytes, not {size}"
        self._remove_hole(start)
        self._used[start] = size
        self._starts[start + size] = start
        self.used_bytes += size
        if hole > size:
            self._add_hole(start + size, hole - size)

    def release(self, start: int) -> None:
        size = self._used.pop(start)
        self.used_bytes -= size
        del self._starts[start + size]
        if start + size in self._free:
            size += self._remove_hole(start + size)
        before = self._starts.get(start)
        if before in self._free:
            start, size = before, size + self._remove_hole(before)
        self._add_hole(start, size)

    def at(self, start: int) -> Span | None:
        """What begins there; None at the end of the pool."""
        if start in self._used:
            return Span(start, self._used[start], False)
        return Span(start, self._free[start], True) if start in self._free else None

    def before(self, start: int) -> Span | None:
        """What ends where something begins; None at the beginning of the pool."""
        return self.at(self._starts[start]) if start in self._starts else None

    def check_integrity(self) -> None:
        """Raises AssertionError unless used and free extents tile [0, capacity) with no two holes side by side."""
        at, last_free = 0, False
        spans = [Span(s, n, False) for s, n in self._used.items()] + [Span(s, n, True) for s, n in self._free.items()]
        for span in sorted(spans):
            assert span.start == at, f"gap or overlap at byte {at}"
            assert span.size > 0, f"empty extent at byte {span.start}"
            assert span.start % ALIGNMENT == 0, f"unaligned extent at byte {span.start}"
            assert not (span.free and last_free), f"holes not merged at byte {span.start}"
            at, last_free = span.end, span.free
        assert at == self.capacity, f"extents end at byte {at} of {self.capacity}"
        assert self._starts == {span.end: span.start for span in spans}, "the index of ends is wrong"
        assert list(self._holes) == sorted((n, s) for s, n in self._free.items()), "the index of holes is wrong"
        assert self.used_bytes == sum(self._used.values()), "used bytes drifted"

    def _add_hole(self, start: int, size: int) -> None:
        self._free[start] = size
        self._starts[start + size] = start
        self._holes.add((size, start))

    def _remove_hole(self, start: int) -> int:
        size = self._free.pop(start)
        del self._starts[start + size]
        self._holes.remove((size, start))
        return size
