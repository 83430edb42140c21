"""Blocks between disk, RAM and the pool, with real files and real reading threads.

A named pipe in the place of a block file keeps the one reading thread waiting until the test lets it go, so that loads
can be looked at while they are on their way.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub.errors import BadRequest, BlockDamaged, Unavailable, WrongBase
from adapterhub.swap.block import Block, block_path, write_block
from adapterhub.swap.copies import Copies
from adapterhub.swap.disk import DiskTier
from adapterhub.swap.hold import Hold
from adapterhub.swap.policies import OwnerRule, Policy, Rules, TierRules
from adapterhub.swap.pool import Pool
from adapterhub.swap.ref import AdapterRef, Tier
from adapterhub.swap.tiers import Tiers
from tests.test_block import LAYOUT, make_block

SIZE = 512  # bytes of an extent: rank 6 of that layout, in bfloat16, is 504


class Store:
    """Tiers over a directory, and the blocks in it."""

    def __init__(
        self,
        directory: Path,
        *,
        extents: int = 4,
        ram: int = 0,
        threads: int = 1,
        disk: DiskTier | None = None,
        copies: Copies | None = None,
        **pool: Any,
    ) -> None:
        self.directory = directory
        self.blocks: dict[str, Block] = {}
        self._news = threading.Semaphore(0)
        fields = {"dtype": torch.bfloat16, "device": torch.device("cpu"), **pool}
        self.tiers = Tiers(
            Pool(extents * SIZE, **fields),
            disk or DiskTier(directory),
            "f" * 64,
            LAYOUT,
            ram_bytes=ram * SIZE,
            load_threads=threads,
            wake=self._news.release,
            copies=copies,
        )

    def put(self, seed: int, rank: int = 6) -> AdapterRef:
        block = make_block(seed=seed, rank=rank)
        write_block(block, self.directory)
        self.blocks[block.digest] = block
        return AdapterRef(str(seed), block.digest, block.meta.nbytes)

    def arrivals(self, count: int) -> None:
        """Waits until that many loads have ended, and takes them in."""
        for _ in range(count):
            assert self._news.acquire(timeout=10)
        self.tiers.poll()

    def settle(self) -> None:
        """Waits until nothing is on its way."""
        while self.tiers._loading:
            self.arrivals(1)

    def load(self, ref: AdapterRef) -> Hold:
        """Pins `ref` and waits for it if it is not there."""
        hold = self.tiers.acquire(ref)
        assert hold is not None
        if not hold.ready:
            self.arrivals(1)
        return hold

    def use(self, ref: AdapterRef) -> Hold:
        """Pins `ref`, checks what lies in the pool, and releases it."""
        hold = self.load(ref)
        self.check(hold)
        self.tiers.release(hold)
        return hold

    def check(self, hold: Hold) -> None:
        block = self.blocks[hold.resident.digest]
        for target, factors in block.meta.layout.all_factors(block.payload, block.meta.rank):
            assert torch.equal(hold.factors[target.name].a, factors.a)
            assert torch.equal(hold.factors[target.name].b, factors.b)

    @contextmanager
    def reader_held_up(self) -> Iterator[None]:
        """The one reading thread is busy within the block; its load of a pipe fails at the end of it."""
        pipe = block_path(self.directory, "pipe")
        os.mkfifo(pipe)
        hold = self.tiers.acquire(AdapterRef("pipe", "pipe", 4))
        assert hold is not None
        yield
        with pipe.open("wb"):
            while hold.error is None:
                self.arrivals(1)
        assert isinstance(hold.error, BlockDamaged)
        self.tiers.release(hold)
        pipe.unlink()

    def fits(self, ref: AdapterRef) -> bool:
        """If others give way that may."""
        residency = self.tiers.contents.residency
        return ref.nbytes <= residency.allocator.capacity - residency.device.pinned_bytes

    def free(self) -> int:
        return self.tiers.contents.residency.allocator.free_bytes

    def on_device(self) -> set[str]:
        return {d for d in self.blocks if self.tiers.tier_of(d) is Tier.DEVICE}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path)
    yield store
    store.tiers.check_integrity()
    store.tiers.close()


@contextmanager
def opened(directory: Path, **fields: Any) -> Iterator[Store]:
    store = Store(directory, **fields)
    yield store
    store.tiers.check_integrity()
    store.tiers.close()


# -- loading


def test_a_block_comes_from_disk_and_is_then_on_the_device(store: Store) -> None:
    ref = store.put(1)
    assert store.tiers.tier_of(ref.digest) is Tier.DISK
    first = store.tiers.acquire(ref)
    assert first is not None
    assert not first.ready
    store.arrivals(1)
    assert (first.ready, first.tier) == (True, Tier.DISK)
    assert first.load_ms > 0
    store.check(first)
    again = store.tiers.acquire(ref)
    assert again is not None
    assert (again.ready, again.tier, again.load_ms) == (True, Tier.DEVICE, 0.0)
    assert store.tiers.tier_of(ref.digest) is Tier.DEVICE
    store.tiers.check_integrity(pins=2)
    store.tiers.release(first)
    store.tiers.release(again)


def test_a_cpu_reads_straight_into_the_pool_and_keeps_no_second_copy(store: Store) -> None:
    hold = store.load(store.put(1))
    pool = store.tiers.pool.tensor
    begin, end = pool.data_ptr(), pool.data_ptr() + pool.nbytes
    assert all(begin <= tensor.data_ptr() < end for factors in hold.factors.values() for tensor in factors)
    assert store.tiers.stats()["ram"]["used_bytes"] == 0
    store.tiers.release(hold)


def test_many_requests_for_one_block_share_one_read(store: Store) -> None:
    ref = store.put(1)
    with store.reader_held_up():
        holds = [store.tiers.acquire(ref) for _ in range(5)]
        assert not any(h and h.ready for h in holds)
    store.arrivals(1)
    for hold in holds:
        assert hold is not None
        assert (hold.ready, hold.tier) == (True, Tier.DISK)
        store.check(hold)
        store.tiers.release(hold)
    assert store.tiers.counters.loaded_bytes == ref.nbytes
    assert store.tiers.counters.hits == {Tier.DISK: 6, Tier.REMOTE: 0, Tier.RAM: 0, Tier.DEVICE: 0}  # and the pipe


def test_what_was_cancelled_on_its_way_arrives_and_serves_the_next(store: Store) -> None:
    ref = store.put(1)
    with store.reader_held_up():
        hold = store.tiers.acquire(ref)
        assert hold is not None
        store.tiers.release(hold)
    store.arrivals(1)
    assert store.use(ref).tier is Tier.DEVICE


def test_a_block_on_its_way_is_not_evicted_for_another(tmp_path: Path) -> None:
    with opened(tmp_path, extents=2) as store:
        ref, other = store.put(1), store.put(2)
        with store.reader_held_up():
            hold = store.tiers.acquire(ref)
            assert hold is not None
            store.tiers.release(hold)
            assert store.tiers.acquire(other) is None
        store.arrivals(1)
        store.use(ref)


def test_closing_waits_for_the_readers(tmp_path: Path) -> None:
    store = Store(tmp_path, threads=2)
    holds = [store.tiers.acquire(store.put(seed)) for seed in range(4)]
    store.tiers.close()
    store.tiers.poll()
    for hold in holds:
        assert hold is not None
        assert hold.ready or isinstance(hold.error, Unavailable)
        store.tiers.release(hold)
    store.tiers.check_integrity()


# -- failures


def spoil(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    "how", [Path.unlink, spoil, lambda p: p.write_bytes(b""), lambda p: p.write_bytes(bytes(9000))]
)
def test_a_damaged_block_is_told_to_all_who_wait_and_can_be_mended(store: Store, how: Any) -> None:
    ref, good = store.put(1), store.put(2)
    how(block_path(store.directory, ref.digest))
    with store.reader_held_up():
        holds = [store.tiers.acquire(ref), store.tiers.acquire(ref)]
        fine = store.tiers.acquire(good)
    store.arrivals(2)
    for hold in holds:
        assert hold is not None
        assert not hold.ready
        assert isinstance(hold.error, BlockDamaged)
        store.tiers.release(hold)
    assert fine is not None
    store.check(fine)
    store.tiers.release(fine)
    store.tiers.check_integrity()
    store.put(1)
    assert store.use(ref).error is None


def failure(store: Store, ref: AdapterRef) -> Any:
    hold = store.load(ref)
    store.tiers.release(hold)
    store.tiers.check_integrity()
    return hold.error


def test_a_block_of_another_base_is_refused(store: Store) -> None:
    ref = store.put(1)
    store.tiers.loader.fingerprint = "0" * 64
    error = failure(store, ref)
    assert isinstance(error, WrongBase)
    assert "ffffffffffff" in error.message


def test_a_block_of_another_size_than_the_registry_says_is_damage(store: Store) -> None:
    assert isinstance(failure(store, store.put(1)._replace(nbytes=84)), BlockDamaged)


def test_a_block_of_another_dtype_than_the_pool_is_damage(tmp_path: Path) -> None:
    with opened(tmp_path, dtype=torch.float16) as store:
        assert isinstance(failure(store, store.put(1)), BlockDamaged)


def test_another_adapters_block_under_its_name_is_damage(store: Store) -> None:
    ref, other = store.put(1), store.put(2)
    block_path(store.directory, ref.digest).write_bytes(block_path(store.directory, other.digest).read_bytes())
    assert isinstance(failure(store, ref), BlockDamaged)


def test_an_adapter_larger_than_the_pool_is_refused_at_once(store: Store) -> None:
    with pytest.raises(Unavailable, match="raise --device-bytes") as caught:
        store.tiers.acquire(store.put(1, rank=60))
    assert caught.value.code == "adapter_too_large"


# -- eviction from the device


def test_the_least_recently_used_goes_first_and_pinned_ones_stay(tmp_path: Path) -> None:
    with opened(tmp_path, extents=3) as store:
        refs = [store.put(seed) for seed in range(5)]
        holds = [store.load(ref) for ref in refs[:3]]
        assert store.tiers.acquire(refs[3]) is None, "all are pinned"
        for i in (1, 0, 2):
            store.tiers.release(holds[i])
        store.use(refs[3])
        assert store.on_device() == {refs[i].digest for i in (0, 2, 3)}
        held = store.load(refs[0])
        store.use(refs[4])
        store.use(refs[1])
        assert refs[0].digest in store.on_device()
        assert store.tiers.contents.evictions == 3
        store.check(held)
        store.tiers.release(held)


def test_a_large_block_takes_neighbours_and_leaves_what_was_used_lately(tmp_path: Path) -> None:
    with opened(tmp_path, extents=4) as store:
        refs = [store.put(seed) for seed in range(4)]
        for i in (3, 0, 1, 2):
            store.use(refs[i])  # extents in this order: the oldest neighbours are 3 and 0
        large = store.put(9, rank=12)
        store.use(large)
        assert store.on_device() == {refs[1].digest, refs[2].digest, large.digest}


def test_what_an_operator_evicts_goes_at_once_when_nobody_uses_it(store: Store) -> None:
    ref = store.put(1)
    store.use(ref)
    assert store.tiers.evict(ref.digest)
    assert store.tiers.tier_of(ref.digest) is Tier.DISK
    assert store.tiers.evict(ref.digest), "it is gone already"
    assert store.use(ref).tier is Tier.DISK


def test_what_an_operator_evicts_while_it_is_used_goes_with_its_last_user(store: Store) -> None:
    ref = store.put(1)
    one, two = store.load(ref), store.load(ref)
    assert not store.tiers.evict(ref.digest)
    store.tiers.release(one)
    store.check(two)
    assert store.tiers.tier_of(ref.digest) is Tier.DEVICE
    store.tiers.release(two)
    assert store.tiers.tier_of(ref.digest) is Tier.DISK


def test_what_is_evicted_on_its_way_serves_those_who_wait_and_then_goes(store: Store) -> None:
    ref = store.put(1)
    with store.reader_held_up():
        hold = store.tiers.acquire(ref)
        assert hold is not None
        assert not store.tiers.evict(ref.digest)
    store.arrivals(1)
    store.check(hold)
    store.tiers.release(hold)
    assert store.tiers.tier_of(ref.digest) is Tier.DISK


def test_what_is_evicted_and_cancelled_on_its_way_goes_when_it_has_arrived(store: Store) -> None:
    """Its extent must not be given away while the reader writes into it."""
    ref = store.put(1)
    with store.reader_held_up():
        hold = store.tiers.acquire(ref)
        assert hold is not None
        assert not store.tiers.evict(ref.digest)
        store.tiers.release(hold)
        store.tiers.check_integrity(pins=1)  # the pipe's
        assert store.tiers.contents.residency.allocator.used_bytes == SIZE + 256
    store.arrivals(1)
    assert store.tiers.contents.residency.allocator.used_bytes == 0
    assert store.tiers.tier_of(ref.digest) is Tier.DISK


def test_what_is_evicted_and_asked_for_again_before_it_went_is_read_once(store: Store) -> None:
    ref = store.put(1)
    one = store.load(ref)
    store.tiers.evict(ref.digest)
    two = store.load(ref)
    assert two.tier is Tier.DEVICE
    store.tiers.release(one)
    store.check(two)
    store.tiers.release(two)
    assert store.tiers.counters.loaded_bytes == ref.nbytes


# -- the host tier


def test_what_leaves_the_device_is_found_in_ram_until_the_budget_is_full(tmp_path: Path) -> None:
    with opened(tmp_path, extents=1, ram=2) as store:
        a, b, c = (store.put(seed) for seed in range(3))
        assert [store.use(ref).tier for ref in (a, b, a)] == [Tier.DISK, Tier.DISK, Tier.RAM]
        assert store.tiers.tier_of(b.digest) is Tier.RAM
        store.use(c)  # b was used longest ago
        assert [store.tiers.tier_of(ref.digest) for ref in (a, b, c)] == [Tier.RAM, Tier.DISK, Tier.DEVICE]
        stats = store.tiers.stats()
        expected = {"budget_bytes": 2 * SIZE, "used_bytes": 2 * SIZE, "adapters": 2, "pinned": 0}
        assert stats["ram"].items() >= {**expected, "hits": 1, "evictions": 1, "hit_ratio": 0.25, "loads": 1}.items()
        assert stats["disk"]["loads"] == 3
        assert stats["device"]["loaded_bytes"] == 3 * 504
        assert stats["device"]["evictions"] == 3
        assert [store.use(ref).tier for ref in (a, b, c)] == [Tier.RAM, Tier.DISK, Tier.DISK]


def test_a_block_larger_than_the_ram_budget_is_not_kept_there(tmp_path: Path) -> None:
    with opened(tmp_path, extents=2, ram=1) as store:
        small, large = store.put(1), store.put(2, rank=12)
        store.use(small)
        store.use(large)
        assert store.tiers.tier_of(small.digest) is Tier.RAM
        store.use(small)
        assert store.tiers.tier_of(large.digest) is Tier.DISK


def test_what_an_operator_evicts_leaves_ram_too(tmp_path: Path) -> None:
    with opened(tmp_path, extents=1, ram=2) as store:
        a, b = store.put(1), store.put(2)
        store.use(a)
        hold = store.load(b)
        assert store.tiers.evict(a.digest)
        assert not store.tiers.evict(b.digest)
        assert store.tiers.stats()["ram"]["adapters"] == 0
        store.check(hold)
        store.tiers.release(hold)
        assert store.tiers.tier_of(b.digest) is Tier.DISK


def test_what_is_evicted_on_its_way_is_not_kept_in_ram(tmp_path: Path) -> None:
    with opened(tmp_path, extents=2, ram=2) as store:
        ref = store.put(1)
        with store.reader_held_up():
            hold = store.tiers.acquire(ref)
            assert hold is not None
            store.tiers.evict(ref.digest)
        store.arrivals(1)
        store.tiers.release(hold)
        assert store.tiers.tier_of(ref.digest) is Tier.DISK


def test_an_operator_may_evict_from_one_tier_alone(tmp_path: Path) -> None:
    with opened(tmp_path, extents=2, ram=2) as store:
        ref = store.put(1)
        store.use(ref)
        assert store.tiers.evict(ref.digest, Tier.DEVICE)
        assert store.tiers.tier_of(ref.digest) is Tier.RAM
        assert store.use(ref).tier is Tier.RAM
        assert store.tiers.evict(ref.digest, Tier.RAM)
        assert store.tiers.stats()["ram"]["adapters"] == 0
        assert store.tiers.tier_of(ref.digest) is Tier.DEVICE


# -- moving


def test_blocks_in_use_are_moved_together_and_their_holds_follow(tmp_path: Path) -> None:
    with opened(tmp_path, extents=5) as store:
        refs = [store.put(seed) for seed in range(5)]
        holds = [store.load(ref) for ref in refs]
        seen = [hold.factors for hold in holds]  # a step has looked at them
        for i in (0, 2):
            store.tiers.release(holds[i])
        large = store.load(store.put(9, rank=12))
        assert store.on_device() == {refs[i].digest for i in (1, 3, 4)} | {large.resident.digest}
        for hold in (holds[1], holds[3], holds[4], large):
            store.check(hold)
        assert store.tiers.contents.moved_bytes == 504
        assert [holds[i].factors is seen[i] for i in (1, 3, 4)] == [False, True, True]
        for hold in (holds[1], holds[3], holds[4], large):
            store.tiers.release(hold)


def test_offsets_say_where_a_moved_block_lies(tmp_path: Path) -> None:
    with opened(tmp_path, extents=3) as store:
        refs = [store.put(seed) for seed in range(2)]
        store.use(refs[0])
        hold = store.load(refs[1])
        before = hold.offsets.clone()
        other = store.load(store.put(9, rank=12))
        moved = torch.where(before >= 0, before - SIZE // 2, before)
        assert torch.equal(hold.offsets, moved)
        for each in (hold, other):
            store.check(each)
            store.tiers.release(each)


# -- pins, rules and budgets


def test_what_is_pinned_stays_and_may_go_once_it_is_unpinned(tmp_path: Path) -> None:
    with opened(tmp_path, extents=2, ram=2) as store:
        pinned, *others = (store.put(seed) for seed in range(4))
        store.use(pinned._replace(pinned=True))
        for ref in others:
            store.use(ref)
        assert pinned.digest in store.on_device()
        store.tiers.pin(pinned.digest, False)
        for ref in others[:2]:
            store.use(ref)
        assert pinned.digest not in store.on_device()
        store.tiers.pin(others[1].digest, True)
        for ref in (pinned, others[0], others[2]):
            store.use(ref)
        assert others[1].digest in store.on_device()
        assert store.tiers.stats()["device"]["pinned"] == 1


def test_rules_set_live_let_go_at_once_of_what_they_do_not_allow(tmp_path: Path) -> None:
    with opened(tmp_path, extents=4, ram=4) as store:
        ada, bob = [store.put(s)._replace(owner="ada") for s in (1, 2)], store.put(3)._replace(owner="bob")
        for ref in (*ada, bob):
            store.use(ref)
        rules = Rules(device=TierRules(owners={"ada": OwnerRule(ceiling_bytes=SIZE)}))
        planned = [(ada[0].digest, SIZE)]
        assert store.tiers.plan(rules, None, None).device == planned
        assert len(store.on_device()) == 3, "a plan changes nothing"
        store.tiers.set_rules(rules)
        assert store.on_device() == {ada[1].digest, bob.digest}
        assert store.use(ada[0]).tier is Tier.RAM
        assert store.on_device() == {ada[0].digest, bob.digest}, "who is over their ceiling takes their own place"


def test_what_is_unused_for_too_long_goes_from_each_tier_but_not_while_it_is_used(tmp_path: Path) -> None:
    with opened(tmp_path, extents=4, ram=4) as store:
        used, unused, kept = (store.put(seed) for seed in range(3))
        hold = store.load(used)
        store.use(unused)
        store.use(kept._replace(pinned=True))
        store.tiers.set_rules(Rules(device=TierRules(ttl_seconds=1e-9)))
        store.tiers.expire()
        assert store.on_device() == {used.digest, kept.digest}
        store.tiers.set_rules(Rules(ram=TierRules(ttl_seconds=1e-9)))
        assert [store.tiers.tier_of(ref.digest) for ref in (used, unused, kept)] == [
            Tier.DEVICE,
            Tier.DISK,
            Tier.DEVICE,
        ]
        store.tiers.release(hold)


def test_a_smaller_pool_keeps_what_was_used_last_and_what_is_in_use(tmp_path: Path) -> None:
    with opened(tmp_path, extents=6) as store:
        refs = [store.put(seed) for seed in range(6)]
        hold = store.load(refs[0])
        for ref in refs[1:]:
            store.use(ref)
        store.tiers.set_budgets(3 * SIZE, None).result(0)
        assert store.tiers.pool.tensor.nbytes == 3 * SIZE
        assert store.on_device() == {refs[i].digest for i in (0, 4, 5)}
        store.check(hold)
        for i in (4, 5):
            assert store.use(refs[i]).tier is Tier.DEVICE
        store.tiers.release(hold)


def test_a_larger_pool_keeps_everything_and_takes_more(tmp_path: Path) -> None:
    with opened(tmp_path, extents=2) as store:
        refs = [store.put(seed) for seed in range(4)]
        for ref in refs[:2]:
            store.use(ref)
        store.tiers.set_budgets(4 * SIZE, None).result(0)
        assert [store.use(ref).tier for ref in refs] == [Tier.DEVICE, Tier.DEVICE, Tier.DISK, Tier.DISK]
        assert len(store.on_device()) == 4


def test_ram_can_be_given_and_taken_while_it_runs(tmp_path: Path) -> None:
    with opened(tmp_path, extents=1) as store:
        a, b = store.put(1), store.put(2)
        store.tiers.set_budgets(None, 2 * SIZE).result(0)
        assert [store.use(ref).tier for ref in (a, b, a)] == [Tier.DISK, Tier.DISK, Tier.RAM]
        store.tiers.set_budgets(None, 0).result(0)
        assert store.use(b).tier is Tier.DISK
        assert store.tiers.stats()["ram"]["used_bytes"] == 0


def test_a_budget_too_small_for_what_must_stay_is_refused_and_changes_nothing(store: Store) -> None:
    hold = store.load(store.put(1))
    store.use(store.put(2)._replace(pinned=True))
    with pytest.raises(BadRequest, match=r"1.0 KiB on the device"):
        store.tiers.set_budgets(SIZE, None)
    assert store.tiers.stats()["device"]["budget_bytes"] == 4 * SIZE
    assert len(store.on_device()) == 2
    store.check(hold)
    store.tiers.release(hold)


def test_a_budget_of_which_pins_would_hold_more_than_their_share_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path, extents=6, ram=6) as store:
        pinned, other = [store.put(seed) for seed in range(3)], store.put(9)
        for ref in pinned:
            store.use(ref._replace(pinned=True))
        for device, ram in ((3 * SIZE, None), (None, 3 * SIZE)):
            with pytest.raises(BadRequest, match=r"of which pins may hold 3/4 each\. Choose more, or unpin"):
                store.tiers.set_budgets(device, ram)
        store.tiers.set_budgets(4 * SIZE, 4 * SIZE).result(0)
        store.use(other)
        assert store.on_device() == {ref.digest for ref in (*pinned, other)}


def test_what_pins_leave_no_room_for_is_refused_and_does_not_wait_for_ever(tmp_path: Path) -> None:
    with opened(tmp_path, extents=4) as store:
        pinned, large = [store.put(seed) for seed in range(3)], store.put(9, rank=12)
        for ref in pinned:
            store.use(ref._replace(pinned=True))
        with pytest.raises(Unavailable, match="no room beside what is pinned") as caught:
            store.tiers.acquire(large)
        assert caught.value.code == "adapter_too_large"
        store.tiers.pin(pinned[0].digest, False)
        store.use(large)


def test_a_change_of_budgets_waits_for_what_is_on_its_way(store: Store) -> None:
    ref, late = store.put(1), store.put(2)
    with store.reader_held_up():
        hold = store.tiers.acquire(ref)
        changed = store.tiers.set_budgets(2 * SIZE, None)
        assert not changed.done()
        assert store.tiers.acquire(late) is None, "nothing else is begun"
        with pytest.raises(BadRequest, match="already"):
            store.tiers.set_budgets(3 * SIZE, None)
    store.arrivals(1)
    changed.result(0)
    assert hold is not None
    store.check(hold)
    store.use(late)
    store.tiers.release(hold)
    assert store.tiers.stats()["device"]["budget_bytes"] == 2 * SIZE


# -- reading ahead


def test_what_is_read_ahead_is_there_when_it_is_asked_for(store: Store) -> None:
    ref = store.put(1)
    store.tiers.prefetch(ref, ())
    store.arrivals(1)
    assert store.use(ref).tier is Tier.DEVICE


def test_reading_ahead_takes_nothing_from_what_is_used_or_wanted_sooner(tmp_path: Path) -> None:
    with opened(tmp_path, extents=4) as store:
        used, old, sooner, later, last = (store.put(seed) for seed in range(5))
        hold = store.load(used)
        for ref in (sooner, old, last):
            store.use(ref)
        assert not store.tiers.prefetch(later, {ref.digest for ref in (sooner, old, last)})
        assert len(store.on_device()) == 4
        assert store.tiers.prefetch(later, {sooner.digest})
        store.arrivals(1)
        assert store.on_device() == {ref.digest for ref in (used, sooner, last, later)}
        store.tiers.release(hold)


def test_nothing_is_read_ahead_while_more_than_half_of_the_pool_is_in_use(store: Store) -> None:
    refs = [store.put(seed) for seed in range(3)]
    holds = [store.load(ref) for ref in refs[:2]]
    assert not store.tiers.prefetch(refs[2], ())
    store.tiers.release(holds.pop())
    assert store.tiers.prefetch(refs[2], ())
    store.arrivals(1)
    store.tiers.release(holds.pop())


def test_reading_ahead_does_not_hold_up_a_read_that_is_waited_for(store: Store) -> None:
    with store.reader_held_up():
        store.tiers.prefetch(store.put(1), ())
        assert len(store.tiers._loading) == 1, "the pipe's"


def test_what_is_read_ahead_in_vain_leaves_nothing(store: Store) -> None:
    ref = AdapterRef("gone", "gone", 504)
    store.tiers.prefetch(ref, ())
    store.arrivals(1)
    assert store.free() == 4 * SIZE
    store.tiers.prefetch(store.put(1, rank=60), ())  # larger than the pool
    assert isinstance(failure(store, ref), BlockDamaged)


# -- all at once


def steer(tiers: Tiers, event: str, number: int, ref: AdapterRef, held: list[Hold]) -> None:
    """What hints and operators ask of a block, by the name of an event; nothing by any other name."""
    if event == "evict":
        tiers.evict(ref.digest)
    elif event == "drop":
        tiers.evict(ref.digest, (Tier.DEVICE, Tier.RAM)[number % 2])
    elif event == "prefetch":
        tiers.prefetch(ref, {hold.resident.digest for hold in held})
    elif event in ("pin", "unpin"):
        tiers.pin(ref.digest, event == "pin")


_EVENTS = ["acquire", "acquire", "acquire", "release", "release", "release", "poll", "wait", "wait", "evict", "drop"]
_steps = st.lists(
    st.tuples(
        st.sampled_from([*_EVENTS, "fail", "prefetch", "pin", "unpin", "budgets", "rules", "expire"]),
        st.integers(0, 99),
    ),
    min_size=20,
    max_size=60,
)
_RULES = [
    Rules(),
    Rules(device=TierRules(Policy.GDSF, 1e-9), ram=TierRules(Policy.LFU)),
    Rules(device=TierRules(Policy.SIEVE, owners={"ada": OwnerRule(2 * SIZE, 4 * SIZE, 2)})),
    Rules(device=TierRules(Policy.LFU, owners={"*": OwnerRule(floor_bytes=SIZE)}), ram=TierRules(Policy.SIEVE, 1e-9)),
]


@settings(max_examples=60)
@given(steps=_steps, ram=st.sampled_from([0, 3]))
def test_nothing_is_lost_or_hurt_by_any_sequence_of_events(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]], ram: int
) -> None:
    with opened(tmp_path_factory.mktemp("tiers"), extents=6, ram=ram, threads=2) as store:
        tiers, held, failed = store.tiers, list[Hold](), list[Hold]()
        refs = [store.put(seed, rank=1 + 5 * seed % 17)._replace(owner=("ada", "bob")[seed % 2]) for seed in range(8)]
        for event, number in steps:
            ref = refs[number % len(refs)]
            if event == "acquire":
                if store.fits(ref):
                    hold = tiers.acquire(ref)
                    held += [hold] if hold else []
            elif event == "fail" and (hold := tiers.acquire(AdapterRef("gone", "gone", 504))):
                failed.append(hold)
            elif event == "release" and held:
                tiers.release(held.pop(number % len(held)))
            elif event == "poll":
                tiers.poll()
            elif event == "wait":
                store.settle()
            elif event == "rules":
                tiers.set_rules(_RULES[number % len(_RULES)])
            elif event == "expire":
                tiers.expire()
            elif event == "budgets":
                with contextlib.suppress(BadRequest):
                    tiers.set_budgets((3 + number % 6) * SIZE, number % 4 * SIZE)
            else:
                steer(tiers, event, number, ref, held)
            for hold in [hold for hold in failed if hold.error is not None]:
                failed.remove(hold)
                assert isinstance(hold.error, BlockDamaged)
                tiers.release(hold)
            tiers.check_integrity(pins=len(held) + len(failed))
            for hold in held:
                assert hold.error is None
                if hold.ready:
                    store.check(hold)
        store.settle()
        for hold in (*held, *failed):
            tiers.release(hold)
        for ref in refs:
            tiers.pin(ref.digest, False)
        tiers.set_rules(Rules())
        for ref in refs:
            if ref.nbytes <= tiers.contents.residency.allocator.capacity:  # whatever happened, it can be had
                last = tiers.acquire(ref)
                assert last is not None
                store.settle()
                store.check(last)
                tiers.release(last)


@pytest.mark.parametrize("ram", [0, 3])
def test_numbers_and_pins_are_right_after_any_sequence_of_events(tmp_path: Path, ram: int) -> None:
    choose = random.Random(0)
    with opened(tmp_path, extents=6, ram=ram, threads=2) as store:
        refs = [store.put(seed, rank=choose.randint(1, 20)) for seed in range(10)]
        held: list[Hold] = []
        for _ in range(1500):
            event = choose.choice(["acquire", "acquire", "release", "release", "poll", "wait", "evict"])
            if event == "acquire":
                hold = store.tiers.acquire(choose.choice(refs))
                held += [hold] if hold else []
            elif event == "release" and held:
                store.tiers.release(held.pop(choose.randrange(len(held))))
            elif event == "poll":
                store.tiers.poll()
            elif event == "wait":
                store.settle()
            elif event == "evict":
                store.tiers.evict(choose.choice(refs).digest)
            store.tiers.check_integrity(pins=len(held))
            for hold in held:
                if hold.ready:
                    store.check(hold)
        for hold in held:
            store.tiers.release(hold)
        store.settle()
        assert store.tiers.contents.evictions > 20
