"""Blocks that only the object store has, on their way to the pool, and what they do not hold up: with real files and
threads, and a store that hangs, fails or lies when it is told to."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub.base.model import Base
from adapterhub.errors import BadRequest, BlockDamaged, Unavailable
from adapterhub.swap.block import block_path
from adapterhub.swap.hold import Hold
from adapterhub.swap.loader import Loader
from adapterhub.swap.ref import AdapterRef, Tier
from adapterhub.swap.store import Store as ObjectStore
from tests.serving import PeftFiles, running, small_config
from tests.test_block import make_block
from tests.test_disk import FaultyFS, Home, failing
from tests.test_tiers import SIZE, Store, spoil, steer
from tests.tiny import encoded, greedy, peft_model, prompt_of, saved, serving, tiny_model

MODEL = tiny_model("llama")


class Far(Store):
    """Tiers over a disk that is a cache of a store; `hang` keeps every download waiting until `go`."""

    def __init__(self, directory: Path, *, budget: int | None = None, **fields: Any) -> None:
        self.home = Home(directory, budget)
        super().__init__(self.home.disk.files.directory, disk=self.home.disk, **fields)
        self.go = threading.Event()
        self.asked = threading.Semaphore(0)

    def put(self, seed: int, rank: int = 6) -> AdapterRef:
        """On the disk, and in the store."""
        block = make_block(seed=seed, rank=rank)
        self.blocks[block.digest] = block
        return self.home.publish(block)

    def put_far(self, seed: int, rank: int = 6) -> AdapterRef:
        """In the store alone."""
        ref = self.put(seed, rank)
        self.home.disk.remove(ref.digest)
        return ref

    def hang(self) -> None:
        self.home.fs.before_get = lambda: (self.asked.release(), self.go.wait(60))

    def settle(self) -> None:
        self.tiers.poll()
        while self.tiers._loading or any(not f.future.done() for f in self.tiers._fetching.values()):
            self.arrivals(1)

    def load(self, ref: AdapterRef) -> Hold:
        hold = self.tiers.acquire(ref)
        assert hold is not None
        self.tiers.poll()
        while not hold.ready and hold.error is None:
            self.arrivals(1)
        return hold


@contextlib.contextmanager
def opened(directory: Path, **fields: Any) -> Iterator[Far]:
    far = Far(directory, **fields)
    yield far
    far.go.set()
    far.settle()
    far.tiers.check_integrity()
    far.tiers.close()
    far.home.disk.files.check_integrity()


def test_a_store_that_hangs_holds_up_neither_disk_nor_device_and_takes_no_room(tmp_path: Path) -> None:
    with opened(tmp_path, extents=2) as far:
        far.hang()
        near, used = far.put(1), far.put(2)
        far.use(used)
        away = [far.tiers.acquire(far.put_far(seed)) for seed in range(10, 10 + Loader.FETCH_THREADS + 4)]
        for _ in range(Loader.FETCH_THREADS):
            assert far.asked.acquire(timeout=60)
        hold = far.load(near)
        far.check(hold)
        assert far.use(used).tier is Tier.DEVICE
        far.tiers.release(hold)
        far.tiers.check_integrity(pins=len(away))
        far.go.set()
        waiting = [hold for hold in away if hold]
        while waiting:  # two have room at a time, and each gives it to another
            far.arrivals(1)
            for hold in [hold for hold in waiting if hold.ready]:
                far.check(hold)
                assert hold.tier is Tier.REMOTE
                far.tiers.release(hold)
                waiting.remove(hold)
            far.tiers.poll()
        assert far.tiers.stats()["store"]["loads"] == len(away) == Loader.FETCH_THREADS + 4


def test_what_comes_from_the_store_takes_its_place_before_who_asked_later(tmp_path: Path) -> None:
    with opened(tmp_path, extents=4) as far:
        holds = [far.load(far.put(seed)) for seed in range(4)]
        large, later = far.put_far(8, rank=12), far.put(9)
        first = far.tiers.acquire(large)
        far.settle()
        assert first is not None
        assert first.away, "there is no room"
        far.tiers.release(holds.pop())
        assert far.tiers.acquire(later) is None
        far.tiers.release(holds.pop())
        far.tiers.poll()
        far.settle()
        far.check(first)
        for hold in (first, *holds):
            far.tiers.release(hold)
        far.use(later)


def test_what_was_cancelled_on_its_way_from_the_store_stays_on_the_disk(tmp_path: Path) -> None:
    with opened(tmp_path) as far:
        far.hang()
        ref = far.put_far(1)
        hold = far.tiers.acquire(ref)
        again = far.tiers.acquire(ref)
        assert hold is not None
        assert again is not None
        far.tiers.release(hold)
        far.tiers.release(again)
        far.go.set()
        far.settle()
        assert far.tiers.tier_of(ref.digest) is Tier.DISK
        assert far.free() == 4 * SIZE
        assert far.use(ref).tier is Tier.DISK


def test_a_store_that_is_gone_is_told_to_all_who_wait_and_asked_again_by_the_next(tmp_path: Path) -> None:
    with opened(tmp_path) as far:
        ref = far.put_far(1)
        far.home.fs.fault = failing(TimeoutError("nobody there"), "get")
        holds = [far.tiers.acquire(ref), far.tiers.acquire(ref)]
        far.settle()
        for hold in holds:
            assert hold is not None
            assert hold.error is not None
            assert hold.error.code == "store_unavailable"
            far.tiers.release(hold)
        far.home.fs.fault = lambda call: None
        assert far.use(ref).tier is Tier.REMOTE


def test_a_hint_brings_a_block_from_the_store_to_the_device(tmp_path: Path) -> None:
    with opened(tmp_path) as far:
        refs = [far.put_far(seed) for seed in range(4)]
        for ref in refs:
            assert far.tiers.prefetch(ref, ())
            far.settle()
        assert [far.tiers.tier_of(ref.digest) for ref in refs] == [Tier.DEVICE] * 4
        kept = [far.load(ref) for ref in refs[:2]]
        more = far.put_far(9)
        far.tiers.prefetch(more, ())
        far.settle()
        assert far.tiers.tier_of(more.digest) is Tier.DISK, "half of the pool is in use"
        for hold in kept:
            far.tiers.release(hold)


@pytest.mark.parametrize("damage", [Path.unlink, spoil])
def test_a_file_that_turns_out_to_be_bad_gives_its_place_back_until_it_is_fetched(tmp_path: Path, damage: Any) -> None:
    with opened(tmp_path, extents=1) as far:
        far.hang()
        ref, other = far.put(1), far.put(2)
        damage(block_path(far.directory, ref.digest))
        hold = far.tiers.acquire(ref)
        assert hold is not None
        far.arrivals(1)
        assert hold.away
        far.use(other)
        far.go.set()
        far.settle()
        far.check(hold)
        far.tiers.release(hold)


def test_a_block_that_others_push_off_the_disk_at_once_is_served_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path) as far:
        fetch = far.home.disk.fetch

        def in_vain(ref: AdapterRef) -> None:
            fetch(ref)
            far.home.disk.files.evict(1, "")

        monkeypatch.setattr(far.home.disk, "fetch", in_vain)
        assert far.use(far.put_far(1)).tier is Tier.REMOTE


def test_a_block_that_neither_disk_nor_store_has_whole_fails_its_own_readers(tmp_path: Path) -> None:
    with opened(tmp_path) as far:
        ref = far.put(1)
        spoil(block_path(far.directory, ref.digest))
        far.home.fs.cut = 5000
        hold = far.load(ref)
        assert isinstance(hold.error, BlockDamaged)
        far.tiers.release(hold)
        far.home.fs.cut = None
        far.use(ref)


def test_a_block_that_the_pool_cannot_hold_any_more_when_it_comes_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as far:
        far.hang()
        hold = far.tiers.acquire(far.put_far(1, rank=12))
        far.tiers.set_budgets(SIZE, None).result(0)
        far.go.set()
        far.settle()
        assert hold is not None
        assert isinstance(hold.error, Unavailable)
        assert hold.error.code == "adapter_too_large"
        far.tiers.release(hold)


# -- with an engine and a server around it


def test_requests_behind_any_number_that_wait_for_a_store_are_answered(llama: Base, tmp_path: Path) -> None:
    far = Far(tmp_path)
    far.hang()
    blocks = [encoded(saved(peft_model(MODEL, seed=seed), tmp_path / f"{seed}"), llama) for seed in range(6)]
    refs = [far.home.publish(block) for block in blocks]
    for ref in refs[1:]:
        far.home.disk.remove(ref.digest)
    with serving(llama, tmp_path, disk=far.home.disk, max_batch=2) as client:
        names = [client.submit(f"far-{n}", prompt_of(5), ref) for n, ref in enumerate(refs[1:], 1)]
        assert client.ask(prompt_of(5), refs[0]) == greedy(peft_model(MODEL, seed=0), prompt_of(5), 8)
        assert all(client.heard(name) == [] for name in names)
        far.go.set()
        for seed, name in enumerate(names, 1):
            assert client.tokens(name) == greedy(peft_model(MODEL, seed=seed), prompt_of(5), 8)
            assert client.heard(name)[0].origin.tier is Tier.REMOTE


def test_a_server_whose_store_hangs_serves_what_it_has_and_stops(
    base_directory: Path,
    tmp_path: Path,
    adapter: PeftFiles,
    other_adapter: PeftFiles,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("adapterhub.api.hub._GRACE_SECONDS", 0.1)
    fs, go, asked = FaultyFS(), threading.Event(), threading.Semaphore(0)
    monkeypatch.setattr(ObjectStore, "open", lambda *_: ObjectStore(fs, "/bucket/prefix", "faulty://bucket/prefix"))
    refused: list[int] = []

    def refusal(act: Callable[[], httpx.Response]) -> None:
        with contextlib.suppress(httpx.TransportError):  # or the server has gone
            refused.append(act().status_code)

    config = small_config(base_directory, tmp_path / "data", store="faulty://bucket/prefix")
    with running(config, grace=1) as server:
        user = server.user()
        near, far = user.import_adapter(adapter, "near"), user.import_adapter(other_adapter, "far")
        server.hub.disk.remove(server.hub.registry.adapter(None, far["id"])[0].digest)
        fs.before_get = lambda: (asked.release(), go.wait(60))
        body = {"model": f"{user.owner}/far", "prompt": [5, 6, 7], "max_tokens": 1}
        asking = [
            threading.Thread(target=refusal, args=(lambda: user.http.post("/v1/completions", json=body),)),
            threading.Thread(target=refusal, args=(lambda: user.http.get(f"/v1/adapters/{far['id']}/download"),)),
        ]
        for thread in asking:
            thread.start()
        assert asked.acquire(timeout=60)
        assert user.ask(f"{user.owner}/near")
        server.evict(near["id"])
        assert user.tier(f"{user.owner}/near") == "disk"
    for thread in asking:
        thread.join(60)
    assert set(refused) <= {503}
    assert not go.is_set(), "nobody waited for the store"
    go.set()


# -- the end


def test_closing_waits_for_no_store_that_hangs(tmp_path: Path) -> None:
    far = Far(tmp_path)
    far.hang()
    holds = [far.tiers.acquire(far.put_far(seed)) for seed in range(Loader.FETCH_THREADS + 2)]
    for _ in range(Loader.FETCH_THREADS):
        assert far.asked.acquire(timeout=60)
    far.home.disk.close()
    far.tiers.close()
    far.tiers.poll()
    for hold in holds:
        assert hold is not None
        assert isinstance(hold.error, Unavailable)
        far.tiers.release(hold)
    with pytest.raises(Unavailable, match="shutting down"):
        far.home.read(AdapterRef("late", "late", 504))
    far.tiers.check_integrity()
    far.go.set()


def test_closing_waits_for_no_read_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterhub.swap.loader.GRACE_SECONDS", 0.01)
    store = Store(tmp_path)
    os.mkfifo(block_path(tmp_path, "pipe"))
    store.tiers.acquire(AdapterRef("pipe", "pipe", 4))
    queued = store.tiers.acquire(store.put(1))
    store.tiers.close()
    store.tiers.poll()
    assert queued is not None
    assert isinstance(queued.error, Unavailable)
    store.tiers.release(queued)
    with block_path(tmp_path, "pipe").open("wb"):  # so that its thread ends with this test
        pass


# -- pins


@pytest.mark.parametrize("pinned", [True, False])
def test_a_pin_that_changes_while_a_request_waits_is_the_one_that_counts(tmp_path: Path, pinned: bool) -> None:
    with opened(tmp_path, extents=4, ram=4) as far:
        near, remote, later = (far.put(1), far.put_far(2), far.put(3))
        near, remote, later = (ref._replace(pinned=not pinned) for ref in (near, remote, later))
        far.hang()
        holds = [far.tiers.acquire(near), far.tiers.acquire(remote)]
        for ref in (near, remote, later):
            far.home.disk.pin(ref.digest, pinned)
            far.tiers.pin(ref.digest, pinned)
        far.go.set()
        far.settle()
        holds.append(far.load(later))
        residency = far.tiers.contents.residency
        for keeper in (residency.device, residency.ram):
            assert [keeper.is_pinned(ref.digest) for ref in (near, remote, later)] == [pinned] * 3
        assert far.home.disk.files.pinned == 3 * pinned
        for hold in holds:
            assert hold is not None
            far.tiers.release(hold)


# -- all at once

_EVENTS = ["acquire", "acquire", "acquire", "release", "release", "release", "poll", "wait", "evict", "leave", "spoil"]
_steps = st.lists(
    st.tuples(st.sampled_from([*_EVENTS, "prefetch", "pin", "unpin", "budgets", "fault"]), st.integers(0, 99)),
    min_size=20,
    max_size=60,
)


@settings(max_examples=40)
@given(steps=_steps, ram=st.sampled_from([0, 3]))
def test_whatever_happens_in_whatever_order_a_block_is_right_or_its_readers_are_told(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]], ram: int
) -> None:
    with opened(tmp_path_factory.mktemp("far"), extents=6, ram=ram, threads=2, budget=40_000) as far:
        tiers, held = far.tiers, list[Hold]()
        refs = [far.put(seed, rank=1 + 5 * seed % 17) for seed in range(8)]
        for event, number in steps:
            ref = refs[number % len(refs)]
            if event == "acquire" and far.fits(ref):
                hold = tiers.acquire(ref)
                held += [hold] if hold else []
            elif event == "release" and held:
                tiers.release(held.pop(number % len(held)))
            elif event == "poll":
                tiers.poll()
            elif event == "wait":
                far.settle()
            elif event == "evict":
                tiers.evict(ref.digest, (Tier.DEVICE, Tier.RAM, None)[number % 3])
            elif event == "leave":
                far.home.disk.files.evict(20_000, "")
            elif event == "spoil" and (path := block_path(far.directory, ref.digest)).exists():
                with contextlib.suppress(FileNotFoundError):  # evicted at this moment
                    os.truncate(path, 100)
            elif event == "budgets":
                with contextlib.suppress(BadRequest):
                    tiers.set_budgets((3 + number % 6) * SIZE, number % 4 * SIZE)
            elif event == "fault":
                far.home.fs.fault = failing(TimeoutError("nobody"), "get", times=number % 4)
            else:
                steer(tiers, event, number, ref, held)
            for hold in [hold for hold in held if hold.error is not None]:
                held.remove(hold)
                assert isinstance(hold.error, Unavailable)
                tiers.release(hold)
            tiers.check_integrity(pins=len(held))
            for hold in held:
                if hold.ready:
                    far.check(hold)
        far.home.fs.fault = lambda call: None
        far.settle()
        for hold in held:
            tiers.release(hold)
        far.settle()
        for ref in refs:
            tiers.pin(ref.digest, False)
        for ref in refs:
            far.home.disk.verify(ref)  # what was spoiled last, nobody may have read since
            if ref.nbytes <= tiers.contents.residency.allocator.capacity:
                far.use(ref)
