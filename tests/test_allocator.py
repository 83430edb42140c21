"""The allocator against a naive one that keeps a list with one entry for each aligned unit of the pool."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.swap.allocator import ALIGNMENT, ExtentAllocator, aligned


class ByteMap:
    """units[i] says which allocation holds unit i; None is free."""

    def __init__(self, capacity: int) -> None:
        self.units: list[int | None] = [None] * (capacity // ALIGNMENT)

    def holes(self) -> list[tuple[int, int]]:
        """(start, size) in bytes of every maximal run of free units."""
        found, start = [], None
        for i, owner in enumerate([*self.units, -1]):
            if owner is None and start is None:
                start = i
            elif owner is not None and start is not None:
                found.append((start * ALIGNMENT, (i - start) * ALIGNMENT))
                start = None
        return found

    def allocate(self, size: int, key: int) -> int | None:
        """The first of the smallest holes that are large enough."""
        fitting = [(hole, start) for start, hole in self.holes() if hole >= size]
        if not fitting:
            return None
        start = min(fitting)[1]
        first = start // ALIGNMENT
        for i in range(first, first + aligned(max(size, 1)) // ALIGNMENT):
            self.units[i] = key
        return start

    def release(self, key: int) -> None:
        self.units = [None if owner == key else owner for owner in self.units]


_steps = st.lists(st.one_of(st.integers(0, 3000), st.integers(-20, -1)), max_size=60)


@given(capacity=st.integers(0, 12_000), steps=_steps)
def test_agrees_with_a_byte_map_on_every_sequence_of_allocations_and_releases(capacity: int, steps: list[int]) -> None:
    allocator, naive = ExtentAllocator(capacity), ByteMap(capacity)
    live: dict[int, int] = {}  # key -> start
    for key, step in enumerate(steps):
        if step >= 0:
            start = allocator.allocate(step)
            assert start == naive.allocate(step, key)
            if start is not None:
                live[key] = start
        elif live:
            gone = list(live)[step % len(live)]
            allocator.release(live.pop(gone))
            naive.release(gone)
        allocator.check_integrity()
        assert allocator.free_extents == naive.holes()
        assert allocator.largest_free == max((size for _, size in naive.holes()), default=0)
        assert allocator.used_bytes == sum(owner is not None for owner in naive.units) * ALIGNMENT
    for start in live.values():
        allocator.release(start)
    assert allocator.used_bytes == 0
    assert allocator.largest_free == allocator.capacity


def test_starts_are_aligned_and_sizes_rounded_up() -> None:
    allocator = ExtentAllocator(10_000)
    assert allocator.capacity == 9984
    assert [allocator.allocate(n) for n in (1, 257, 256)] == [0, 256, 768]
    assert allocator.used_bytes == 4 * ALIGNMENT


def test_takes_the_smallest_hole_that_fits() -> None:
    allocator = ExtentAllocator(20 * ALIGNMENT)
    starts = [allocator.allocate(n * ALIGNMENT) for n in (5, 1, 3, 1, 10)]
    allocator.release(starts[0])
    allocator.release(starts[2])
    assert allocator.allocate(2 * ALIGNMENT) == starts[2]


def test_a_full_pool_gives_nothing_and_stays_as_it_is() -> None:
    allocator = ExtentAllocator(4 * ALIGNMENT)
    allocator.allocate(3 * ALIGNMENT)
    assert allocator.allocate(2 * ALIGNMENT) is None
    allocator.check_integrity()
    assert allocator.free_extents == [(3 * ALIGNMENT, ALIGNMENT)]


def test_releasing_what_was_not_allocated_is_an_error_and_changes_nothing() -> None:
    allocator = ExtentAllocator(4 * ALIGNMENT)
    allocator.allocate(ALIGNMENT)
    with pytest.raises(KeyError):
        allocator.release(ALIGNMENT)
    allocator.check_integrity()


@pytest.mark.parametrize(
    ("used", "free", "complaint"),
    [
        ({0: 512}, {256: 768}, "overlap"),
        ({0: 256}, {512: 512}, "gap"),
        ({}, {0: 512, 512: 512}, "not merged"),
        ({0: 0}, {0: 1024}, "empty"),
        ({0: 100}, {100: 924}, "unaligned"),
        ({0: 256}, {256: 512}, "end at byte 768"),
    ],
)
def test_check_integrity_sees_it(used: dict[int, int], free: dict[int, int], complaint: str) -> None:
    allocator = ExtentAllocator(1024)
    allocator._used, allocator._free = used, free
    with pytest.raises(AssertionError, match=complaint):
        allocator.check_integrity()
