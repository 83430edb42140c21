"""Extents of the pool, as plain integers. Used by the pool that serves, by the simulator and by tests alike."""

from __future__ import annotations

from bisect import bisect_left, insort

ALIGNMENT = 256  # bytes


def aligned(size: int) -> int:
    """`size` rounded up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class ExtentAllocator:
    """Hands out non-overlapping, aligned extents [start, start + size) of [0, capacity), in bytes.

    Best fit, so that small blocks do not cut up the room that large ones need; neighbours merge when freed.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity // ALIGNMENT * ALIGNMENT
        self._used: dict[int, int] = {}  # start -> size
        self._free: list[tuple[int, int]] = [(0, self.capacity)] if self.capacity else []  # (start, size), by start

    @property
    def used_bytes(self) -> int:
        return sum(self._used.values())

    @property
    def largest_free(self) -> int:
        return max((size for _, size in self._free), default=0)

    @property
    def free_extents(self) -> list[tuple[int, int]]:
        """(start, size) of each hole, by start."""
        return list(self._free)

    def allocate(self, size: int) -> int | None:
        """The start of a fresh extent of at least `size` bytes, or None when no hole is large enough."""
        size = aligned(max(size, 1))
        fitting = [(hole, index) for index, (_, hole) in enumerate(self._free) if hole >= size]
        if not fitting:
            return None
        _, index = min(fitting)
        start, hole = self._free[index]
        if hole == size:
            del self._free[index]
        else:
            self._free[index] = (start + size, hole - size)
        self._used[start] = size
        return start

    def release(self, start: int) -> None:
        size = self._used.pop(start)
        index = bisect_left(self._free, (start, 0))
        if index < len(self._free) and self._free[index][0] == start + size:
            size += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == start:
            start, before = self._free.pop(index - 1)
            size += before
        insort(self._free, (start, size))

    def check_integrity(self) -> None:
        """Raises AssertionError unless used and free extents tile [0, capacity) with no two holes side by side."""
        at, last_free = 0, False
        spans = [(s, n, False) for s, n in self._used.items()] + [(s, n, True) for s, n in self._free]
        for start, size, free in sorted(spans):
            assert start == at, f"gap or overlap at byte {at}"
            assert size > 0, f"empty extent at byte {start}"
            assert start % ALIGNMENT == 0, f"unaligned extent at byte {start}"
            assert not (free and last_free), f"holes not merged at byte {start}"
            at, last_free = start + size, free
        assert at == self.capacity, f"extents end at byte {at} of {self.capacity}"
