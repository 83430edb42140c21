"""A pool that gives memory back while it serves: what goes, what stays and where, and what others must not take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from adapterhub.errors import BadRequest
from adapterhub.swap.pool import Pool
from adapterhub.swap.ref import AdapterRef, Tier
from tests.test_tiers import SIZE, Store, opened, store

__all__ = ["store"]


def failing(fails: Callable[[int], bool]) -> Callable[[Pool, int], torch.Tensor]:
    """What takes the place of `Pool.memory`: sizes that fail are those that others have taken."""
    memory = Pool.memory

    def take(pool: Pool, capacity: int) -> torch.Tensor:
        if fails(capacity):
            raise torch.OutOfMemoryError(f"{capacity} bytes are not to be had")
        return memory(pool, capacity)

    return take


def used(store: Store, count: int) -> list[AdapterRef]:
    refs = [store.put(seed) for seed in range(count)]
    for ref in refs:
        store.use(ref)
    return refs


def test_what_nobody_uses_goes_and_what_is_in_use_is_found_at_its_new_place(tmp_path: Path) -> None:
    with opened(tmp_path, extents=6) as store:
        refs = [store.put(seed) for seed in range(6)]
        holds = {i: store.load(refs[i]) for i in range(6)}
        for i in (0, 1, 2, 4):
            store.tiers.release(holds.pop(i))
        before = [hold.factors for hold in holds.values()]
        assert store.tiers.give_back(3 * SIZE) == 3 * SIZE
        assert store.tiers.pool.tensor.nbytes == 3 * SIZE
        assert store.on_device() == {refs[i].digest for i in (3, 4, 5)}
        for hold, seen in zip(holds.values(), before, strict=True):
            assert hold.factors is not seen
            store.check(hold)
        store.tiers.check_integrity(pins=2)
        assert store.use(refs[0]).tier is Tier.DISK, "in the place of the one that nobody uses"
        for hold in holds.values():
            store.check(hold)
            store.tiers.release(hold)


def test_statistics_and_later_budgets_go_by_the_smaller_pool(tmp_path: Path) -> None:
    with opened(tmp_path, extents=6) as store:
        refs = used(store, 6)
        assert store.tiers.give_back(4 * SIZE) == 4 * SIZE
        device = store.tiers.stats()["device"]
        assert (device["budget_bytes"], device["adapters"], device["evictions"]) == (2 * SIZE, 2, 4)
        store.tiers.set_budgets(5 * SIZE, None).result(0)
        assert [store.use(ref).tier for ref in refs[4:]] == [Tier.DEVICE, Tier.DEVICE]
        for ref in refs:
            store.use(ref)
        assert len(store.on_device()) == 5


def test_what_cannot_be_given_without_those_in_use_or_pinned_is_not_given(tmp_path: Path) -> None:
    with opened(tmp_path, extents=4) as store:
        refs = [store.put(seed) for seed in range(4)]
        hold = store.load(refs[0])
        store.use(refs[1]._replace(pinned=True))
        for ref in refs[2:]:
            store.use(ref)
        assert store.tiers.give_back(4 * SIZE) == 2 * SIZE, "as much as there is"
        assert store.on_device() == {refs[0].digest, refs[1].digest}
        assert store.tiers.give_back(1) == 0
        store.check(hold)
        store.tiers.release(hold)


def test_the_largest_adapter_that_ever_came_still_fits(tmp_path: Path) -> None:
    with opened(tmp_path, extents=4) as store:
        large = store.put(1, rank=12)
        store.use(large)
        store.tiers.evict(large.digest)
        assert store.tiers.give_back(4 * SIZE) == 2 * SIZE
        store.use(large)


def test_the_largest_adapter_that_ever_came_still_fits_beside_the_pins(tmp_path: Path) -> None:
    with opened(tmp_path, extents=8) as store:
        pinned, large = [store.put(seed) for seed in range(3)], store.put(9, rank=12)
        for ref in pinned:
            store.use(ref._replace(pinned=True))
        store.use(large)
        assert store.tiers.give_back(8 * SIZE) == 3 * SIZE
        store.use(large)
        assert store.on_device() == {ref.digest for ref in (*pinned, large)}


def test_nothing_is_given_while_a_load_is_on_its_way_or_budgets_change(store: Store) -> None:
    with store.reader_held_up():
        assert store.tiers.give_back(SIZE) == 0
        changed = store.tiers.set_budgets(3 * SIZE, None)
        assert store.tiers.give_back(SIZE) == 0
    changed.result(0)
    assert store.tiers.give_back(SIZE) == SIZE


def test_two_pools_are_never_there_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path, extents=4, ram=2) as store:
        refs = used(store, 4)
        old = StorageWeakRef(store.tiers.pool.tensor.untyped_storage())
        monkeypatch.setattr(Pool, "memory", failing(lambda _: not old.expired()))
        assert store.tiers.give_back(SIZE) == SIZE
        assert [store.use(ref).tier for ref in refs[1:]] == [Tier.DEVICE] * 3


@pytest.mark.parametrize("extents", [2, 3, 6])
def test_where_there_is_no_room_for_two_pools_another_budget_is_had_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extents: int
) -> None:
    with opened(tmp_path, extents=4) as store:
        refs = [store.put(seed) for seed in range(4)]
        hold = store.load(refs[0])
        for ref in refs[1:]:
            store.use(ref)
        old = StorageWeakRef(store.tiers.pool.tensor.untyped_storage())
        monkeypatch.setattr(Pool, "memory", failing(lambda _: not old.expired()))
        store.tiers.set_budgets(extents * SIZE, None).result(0)
        assert store.tiers.stats()["device"]["budget_bytes"] == extents * SIZE
        assert len(store.on_device()) == min(extents, 4)
        store.check(hold)
        store.tiers.release(hold)


def test_a_budget_that_the_device_does_not_have_is_refused_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path, extents=4) as store:
        refs = used(store, 4)
        monkeypatch.setattr(Pool, "memory", failing(lambda capacity: capacity > 4 * SIZE))
        with pytest.raises(BadRequest, match=r"pool of 3.0 KiB"):
            store.tiers.set_budgets(6 * SIZE, None).result(0)
        assert store.tiers.stats()["device"]["budget_bytes"] == 4 * SIZE
        assert [store.use(ref).tier for ref in refs] == [Tier.DEVICE] * 4


def test_what_others_took_meanwhile_is_given_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path, extents=6) as store:
        refs = [store.put(seed) for seed in range(6)]
        hold = store.load(refs[0])
        for ref in refs[1:]:
            store.use(ref)
        monkeypatch.setattr(Pool, "memory", failing(lambda capacity: capacity > 3 * SIZE))
        assert store.tiers.give_back(SIZE) == 3 * SIZE
        assert store.on_device() == {refs[i].digest for i in (0, 4, 5)}
        store.check(hold)
        monkeypatch.setattr(Pool, "memory", failing(lambda capacity: capacity > SIZE))
        assert store.tiers.give_back(1) == 2 * SIZE, "in the end, the one in use alone stays"
        store.check(hold)
        store.tiers.release(hold)


def test_where_not_even_what_is_in_use_has_a_place_any_more_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    used(store, 4)
    monkeypatch.setattr(Pool, "memory", failing(lambda _: True))
    with pytest.raises(torch.OutOfMemoryError):
        store.tiers.give_back(SIZE)
    store.tiers.close()


def test_nothing_is_given_where_host_memory_has_no_room_for_what_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path, extents=4) as store:
        refs = used(store, 4)
        monkeypatch.setattr("adapterhub.swap.resize.available_bytes", lambda: 2 * SIZE)
        assert store.tiers.give_back(SIZE) == 0
        assert [store.use(ref).tier for ref in refs] == [Tier.DEVICE] * 4
        assert store.tiers.give_back(2 * SIZE) == 2 * SIZE
