"""Who gets room in a pool full of adapters in use: the scheduler over tiers with real blocks, without a model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from adapterhub.base.ahead import Ahead
from adapterhub.base.batch import KV_BLOCK
from adapterhub.base.kv import KVCache, KVShape
from adapterhub.base.request import Request, Sampling
from adapterhub.base.scheduler import Scheduler, Sequence
from adapterhub.swap.ref import AdapterRef
from tests.test_fetching import Far, opened
from tests.tiny import CPU

BATCH = 4
ROOM = 6  # adapters


class Floor:
    """Runs turns as the engine does, with 7 for every new token. Between them it waits for the readers, so that how
    many turns something takes depends on no clock."""

    def __init__(self, far: Far) -> None:
        self.far, self.tiers = far, far.tiers
        kv = KVCache({0: KVShape(1, 1, 1)}, 1000 * KV_BLOCK * 4, torch.bfloat16, CPU)
        self.scheduler = Scheduler(kv, max_batch=BATCH, max_step_tokens=64)
        self._ahead = Ahead(self.scheduler, self.tiers)
        self.ended: list[Sequence] = []
        self._ids = map(str, itertools.count())

    def submit(self, owner: str, adapter: AdapterRef | None, count: int = 200) -> Sequence:
        sequence = Sequence.of(Request(next(self._ids), [1, 2, 3], Sampling(max_tokens=count), adapter, owner))
        self.scheduler.add(sequence)
        return sequence

    def many(self, count: int) -> list[Sequence]:
        """One owner's requests, each for an adapter of its own, as far as they have got after some turns."""
        sequences = [self.submit("many", self.far.put(seed)) for seed in range(count)]
        self.steps(5)
        assert self.scheduler.running == sequences[:BATCH]
        assert [s.hold is not None for s in sequences] == [i < ROOM for i in range(count)]
        return sequences

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.far.settle()
            assert self._ahead.bring() == []
            for work in self.scheduler.schedule():
                assert work.sequence.ready
                self.scheduler.advance(work, 7 if work.samples else None)
                if work.sequence.produced == work.sequence.request.sampling.max_tokens:
                    self.end(work.sequence)
            self.scheduler.check_integrity()
            self.tiers.check_integrity(len(self.scheduler.find(lambda s: s.hold is not None)))

    def end(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        if sequence.hold is not None:
            self.tiers.release(sequence.hold)
            sequence.hold = None
        self.ended.append(sequence)

    def until_ended(self, sequences: list[Sequence]) -> None:
        for _ in range(2000):
            if all(s in self.ended for s in sequences):
                return
            self.steps(1)
        pytest.fail("somebody waits forever")


@pytest.fixture
def floor(tmp_path: Path) -> Iterator[Floor]:
    with opened(tmp_path, extents=ROOM) as far:
        floor = Floor(far)
        yield floor
        for sequence in floor.scheduler.find(lambda _: True):
            floor.end(sequence)


def test_one_owners_adapters_that_fill_the_pool_hold_a_first_token_up_by_two_steps_at_most(floor: Floor) -> None:
    sequences = floor.many(30)
    newcomers = [floor.submit(f"new {i}", floor.far.put(100 + i), count=20) for i in range(3)]
    floor.steps(2)  # its adapter is read beside the first of them
    assert all(s.produced for s in newcomers)
    assert floor.ended == []
    floor.until_ended([*sequences, *newcomers])


def test_nor_do_they_where_the_newcomers_adapter_comes_from_the_store(floor: Floor) -> None:
    floor.many(30)
    newcomer = floor.submit("new", floor.far.put_far(100))
    floor.steps(3)  # one for the way to the disk
    assert newcomer.produced
    assert floor.ended == []


def test_nor_where_theirs_came_from_the_store_first_and_wait_for_room(floor: Floor) -> None:
    floor.many(ROOM)
    waiting = [floor.submit("many", floor.far.put_far(seed)) for seed in range(50, 53)]
    floor.steps(3)
    assert all(s.hold is not None and s.hold.crowded for s in waiting)
    newcomers = [floor.submit("near", floor.far.put(100)), floor.submit("far", floor.far.put_far(101))]
    floor.steps(3)
    assert all(s.produced for s in newcomers)
    assert floor.ended == []
    floor.until_ended([*waiting, *newcomers])


def test_who_waits_gives_way_before_who_runs_and_the_last_in_turn_first(floor: Floor) -> None:
    sequences = floor.many(30)
    floor.submit("new", floor.far.put(100))
    floor.steps(1)
    assert floor.scheduler.running == sequences[:BATCH]
    assert [s.hold is not None for s in sequences[:ROOM]] == [True] * (ROOM - 1) + [False]


def test_an_owner_with_one_adapter_loses_it_to_nobody(floor: Floor) -> None:
    running = [floor.submit(f"runs {i}", floor.far.put(i)) for i in range(BATCH)]
    floor.steps(2)
    waiting = [floor.submit(f"waits {i}", floor.far.put(50 + i)) for i in range(ROOM - BATCH)]
    floor.steps(2)
    late = floor.submit("late", floor.far.put(100))
    floor.steps(20)
    assert floor.scheduler.running == running
    assert all(s.hold is not None for s in waiting)
    assert late.hold is None
    floor.until_ended([*running, *waiting, late])


def test_nobody_gives_way_where_that_makes_no_room(floor: Floor) -> None:
    sequences = floor.many(ROOM)
    newcomer = floor.submit("new", floor.far.put(100, rank=36))  # as large as the pool
    floor.steps(20)
    assert floor.scheduler.running == sequences[:BATCH]
    assert all(s.hold is not None for s in sequences)
    floor.until_ended([newcomer])


def test_who_wants_what_is_in_use_goes_past_those_that_wait_for_room(floor: Floor) -> None:
    small, large = floor.far.put(1), floor.far.put(2, rank=30)  # the two fill the pool, and half the batch
    first, second = (floor.submit("one", adapter) for adapter in (small, large))
    floor.steps(3)
    waiting = [floor.submit("one", floor.far.put(100 + i), count=1) for i in range(BATCH + 1)]
    behind = [floor.submit("one", small, count=1) for _ in range(3 * BATCH)]
    floor.steps(20)
    assert floor.scheduler.running == [first, second]
    assert floor.ended == behind
    floor.end(second)
    floor.until_ended(waiting)
