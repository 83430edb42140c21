"""Blocks on their way from host memory to a device that copies by itself: a twin of a GPU's stream, whose copies end
when the test says so, and which sees whether what it copies stays as it is until then."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub.errors import BadRequest, BlockDamaged
from adapterhub.swap.arena import Arena
from adapterhub.swap.block import block_path
from adapterhub.swap.copies import Copies
from adapterhub.swap.hold import Hold
from adapterhub.swap.ref import AdapterRef, Tier
from tests.test_tiers import SIZE, Store, steer

TAKES = 7000.0  # milliseconds that a copy says it took, more than any test


class SlowCopy:
    def __init__(self, stream: Stream, target: torch.Tensor, source: torch.Tensor) -> None:
        self.joined = False
        self._stream, self._target, self._source, self._promised = stream, target, source, source.clone()
        self._landed = False
        self._ended = threading.Event()

    def done(self) -> bool:
        return self._ended.is_set()

    def wait(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._stream.end(self)
        assert self._ended.wait(10)

    def join(self) -> None:
        """What the device does from now on finds the block; what the host sees is a copy that has not ended."""
        self.joined = True
        self._stream.land(self)

    @property
    def ms(self) -> float:
        self.wait()
        return TAKES

    def land(self) -> None:
        if not self._landed:
            self._target.copy_(self._source)
        self._landed = True

    def end(self) -> None:
        self.land()
        assert torch.equal(self._source, self._promised), "its place was given to another before it was copied"
        self._ended.set()


class Stream(Copies):
    """One copy after the other. What has landed is in the pool; what has ended is known to have landed."""

    queues = True

    def __init__(self, staging_bytes: int = 2 * SIZE) -> None:
        self.staging_bytes = staging_bytes
        self.under_way: deque[SlowCopy] = deque()
        self.threads: list[threading.Thread] = []
        self._lock = threading.RLock()

    def mark(self) -> object:
        return "all that was queued by now"

    def start(self, target: torch.Tensor, source: torch.Tensor, after: object) -> SlowCopy:
        assert after is not None
        with self._lock:
            copy = SlowCopy(self, target, source)
            self.under_way.append(copy)
            self.threads.append(threading.current_thread())
        return copy

    def land(self, last: SlowCopy) -> None:
        with self._lock:
            for copy in list(self.under_way):
                copy.land()
                if copy is last:
                    break

    def end(self, last: SlowCopy | None = None) -> None:
        """All, or those up to one."""
        with self._lock:
            while self.under_way:
                copy = self.under_way.popleft()
                copy.end()
                if copy is last:
                    break


class SlowStore(Store):
    def __init__(self, directory: Path, *, extents: int = 4, ram: int = 4, staging: int = 2, threads: int = 1) -> None:
        self.stream = Stream(staging * SIZE)
        super().__init__(directory, extents=extents, ram=ram, threads=threads, copies=self.stream)

    def begun(self, ref: AdapterRef) -> Hold:
        """Pins `ref`, whose copy is then under way."""
        hold = self.tiers.acquire(ref)
        assert hold is not None
        while not self.tiers._loading._loads[ref.digest].copying:
            self.arrivals(1)
        assert self.stream.under_way
        return hold

    def end(self) -> None:
        """All copies, which the tiers take in."""
        self.stream.end()
        self.tiers.poll()

    def settle(self) -> None:
        while self.tiers._loading:
            self.stream.end()
            self.arrivals(1)
        self.end()

    def load(self, ref: AdapterRef) -> Hold:
        hold = self.tiers.acquire(ref)
        assert hold is not None
        self.settle()
        return hold


@contextmanager
def opened(directory: Path, **fields: int) -> Iterator[SlowStore]:
    store = SlowStore(directory, **fields)
    yield store
    store.settle()
    store.tiers.check_integrity()
    store.tiers.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SlowStore]:
    with opened(tmp_path) as store:
        yield store


def test_a_block_is_there_when_its_copy_has_ended_and_the_engine_is_woken_then(store: SlowStore) -> None:
    hold = store.begun(store.put(1))
    assert not hold.ready
    store.tiers.poll()
    assert not hold.ready
    store.stream.end()
    store.arrivals(1)
    assert (hold.ready, hold.tier) == (True, Tier.DISK)
    assert hold.load_ms > 0
    store.check(hold)
    store.tiers.release(hold)


def test_what_ram_has_is_queued_at_once_whatever_the_readers_do(store: SlowStore) -> None:
    ref = store.put(1)
    store.use(ref)
    store.tiers.evict(ref.digest, Tier.DEVICE)
    with store.reader_held_up():
        hold = store.tiers.acquire(ref)
        assert hold is not None
        assert store.stream.threads[-1] is threading.current_thread()
        store.end()
        assert (hold.ready, hold.tier) == (True, Tier.RAM)
        store.check(hold)
        store.tiers.release(hold)


def test_while_host_memory_is_not_page_locked_a_reader_begins_the_copy(
    store: SlowStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may take as long as the copy itself."""
    monkeypatch.setattr(Arena, "is_locked", False)
    ref = store.put(1)
    store.use(ref)
    store.tiers.evict(ref.digest, Tier.DEVICE)
    hold = store.begun(ref)
    assert store.stream.threads[-1] is not threading.current_thread()
    store.end()
    assert hold.tier is Tier.RAM
    store.check(hold)
    store.tiers.release(hold)


def test_where_nothing_else_runs_the_next_that_is_waited_for_is_used_while_it_is_copied(store: SlowStore) -> None:
    ahead, first, second = (store.put(seed) for seed in range(3))
    assert store.tiers.prefetch(ahead, ())
    store.arrivals(1)
    holds = [store.begun(first), store.begun(second)]
    store.tiers.poll(idle=True)
    assert [hold.ready for hold in holds] == [True, False]
    assert [copy.joined for copy in store.stream.under_way] == [False, True, False], "the device waits for it"
    store.check(holds[0])
    store.tiers.poll(idle=True)
    assert holds[1].ready
    for hold in holds:
        store.tiers.release(hold)


def test_a_load_takes_until_its_copy_has_ended_and_is_counted_then(store: SlowStore) -> None:
    """Also one that is used while it is copied, and one whose copy had ended before anybody looked."""
    refs = [store.put(seed) for seed in range(2)]
    for ref in refs:
        store.use(ref)
        store.tiers.evict(ref.digest, Tier.DEVICE)
    before = store.tiers.stats()
    first = store.begun(refs[0])
    store.tiers.poll(idle=True)
    assert first.ready
    assert store.tiers.stats()["ram"]["loads"] == before["ram"]["loads"]
    second = store.tiers.acquire(refs[1])
    assert second is not None
    store.end()
    for hold in (first, second):
        assert hold.tier is Tier.RAM
        assert TAKES < hold.load_ms < 2 * TAKES
        store.tiers.release(hold)
    stats = store.tiers.stats()
    assert stats["ram"]["loads"] == before["ram"]["loads"] + 2
    assert stats["device"]["loads"] == before["device"]["loads"] + 2
    assert TAKES < stats["ram"]["load_ms"]["p50"] < 2 * TAKES


def test_a_place_in_ram_is_no_other_block_s_while_it_is_copied_from(tmp_path: Path) -> None:
    """The second block passes through beside it, and is not kept."""
    with opened(tmp_path, ram=1) as store:
        one, two = store.put(1), store.put(2)
        holds = [store.begun(one), store.begun(two)]
        store.end()
        for hold in holds:
            store.check(hold)
            store.tiers.release(hold)
        assert store.tiers.evict(one.digest, Tier.DEVICE)
        assert store.tiers.evict(two.digest, Tier.DEVICE)
        assert [store.tiers.tier_of(ref.digest) for ref in (one, two)] == [Tier.RAM, Tier.DISK]
        assert store.use(two).tier is Tier.DISK, "and now it takes the place of the other"
        assert store.tiers.contents.host.evictions == 1


def test_a_place_that_was_promised_to_the_device_is_in_use_until_its_copy_has_ended(tmp_path: Path) -> None:
    with opened(tmp_path, ram=1) as store:
        hold = store.begun(store.put(1))
        store.tiers.poll(idle=True)
        assert hold.ready
        other = store.begun(store.put(2))
        store.end()
        store.check(other)
        assert store.tiers.stats()["ram"]["adapters"] == 1
        for each in (hold, other):
            store.tiers.release(each)


@pytest.mark.parametrize("staging", [0, 1, 2])
def test_without_room_in_host_memory_blocks_come_to_the_device_all_the_same(tmp_path: Path, staging: int) -> None:
    with opened(tmp_path, ram=0, staging=staging) as store:
        large = store.put(9, rank=12)
        holds = [store.begun(store.put(1)), store.begun(store.put(2)), store.begun(large)]
        store.end()
        for hold in holds:
            store.check(hold)
            store.tiers.release(hold)
        assert store.tiers.stats()["ram"]["adapters"] == 0


def test_what_is_evicted_from_ram_while_it_is_copied_goes_when_that_has_ended(store: SlowStore) -> None:
    ref = store.put(1)
    store.use(ref)
    store.tiers.evict(ref.digest, Tier.DEVICE)
    hold = store.begun(ref)
    store.tiers.evict(ref.digest, Tier.RAM)
    store.end()
    store.check(hold)
    store.tiers.release(hold)
    assert store.tiers.stats()["ram"]["used_bytes"] == 0


def test_a_read_that_fails_leaves_no_place_in_ram_or_beside_it(tmp_path: Path) -> None:
    for ram in (0, 2):
        directory = tmp_path / str(ram)
        directory.mkdir()
        with opened(directory, ram=ram) as store:
            ref = store.put(1)
            block_path(directory, ref.digest).write_bytes(b"")
            hold = store.load(ref)
            assert isinstance(hold.error, BlockDamaged)
            store.tiers.release(hold)
            assert store.tiers.stats()["ram"]["used_bytes"] == 0
            store.tiers.check_integrity()


def test_budgets_and_what_is_given_back_wait_for_copies_that_were_promised(tmp_path: Path) -> None:
    with opened(tmp_path, extents=4, ram=4) as store:
        refs = [store.put(seed) for seed in range(3)]
        holds = [store.load(ref) for ref in refs[:2]]
        holds.append(store.begun(refs[2]))
        assert store.tiers.give_back(SIZE) == 0, "one is on its way"
        store.tiers.poll(idle=True)
        assert store.tiers.give_back(SIZE) == SIZE
        store.tiers.evict(refs[0].digest, Tier.RAM)
        store.tiers.set_budgets(None, 2 * SIZE).result(0)
        for hold in holds:
            store.check(hold)
            store.tiers.release(hold)
            store.tiers.evict(hold.resident.digest, Tier.DEVICE)
        assert [store.use(ref).tier for ref in reversed(refs)] == [Tier.RAM, Tier.RAM, Tier.DISK]


def test_closing_waits_for_copies(tmp_path: Path) -> None:
    store = SlowStore(tmp_path)
    holds = [store.begun(store.put(seed)) for seed in range(2)]
    store.tiers.poll(idle=True)
    store.tiers.close()
    assert not store.stream.under_way
    store.tiers.poll()
    for hold in holds:
        store.check(hold)


_EVENTS = ["acquire", "acquire", "acquire", "release", "release", "poll", "idle", "end", "end", "wait"]
_RARELY = ["drop", "evict", "fail", "prefetch", "pin", "unpin", "budgets", "give"]


@settings(max_examples=60)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from([*_EVENTS, *_RARELY]), st.integers(0, 99)),
        min_size=20,
        max_size=60,
    ),
    ram=st.sampled_from([0, 2, 5]),
    staging=st.sampled_from([0, 3]),
)
def test_no_place_is_reused_or_read_too_early_in_any_sequence_of_events(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]], ram: int, staging: int
) -> None:
    with opened(tmp_path_factory.mktemp("copies"), extents=6, ram=ram, staging=staging, threads=2) as store:
        tiers, held = store.tiers, list[Hold]()
        refs = [store.put(seed, rank=1 + 5 * seed % 17) for seed in range(8)]
        for event, number in steps:
            ref = refs[number % len(refs)]
            if event == "acquire" and store.fits(ref):
                hold = tiers.acquire(ref)
                held += [hold] if hold else []
            elif event == "fail" and (hold := tiers.acquire(AdapterRef("gone", "gone", 504))):
                tiers.release(hold)
            elif event == "release" and held:
                tiers.release(held.pop(number % len(held)))
            elif event in ("poll", "idle"):
                tiers.poll(idle=event == "idle")
            elif event == "end":
                if store.stream.under_way:
                    store.stream.end(store.stream.under_way[0])
            elif event == "wait":
                store.settle()
            elif event == "budgets":
                with suppress(BadRequest):
                    tiers.set_budgets((3 + number % 6) * SIZE, number % 5 * SIZE)
            elif event == "give":
                tiers.give_back(number % 4 * SIZE)
            else:
                steer(tiers, event, number, ref, held)
            tiers.check_integrity(pins=len(held))
            for hold in held:
                assert hold.error is None
                if hold.ready:
                    store.check(hold)
        store.settle()
        for hold in held:
            store.check(hold)
            tiers.release(hold)
