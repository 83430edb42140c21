"""The disk as the truth and as a cache of a store: whole blocks or clear errors, whatever disks and stores do."""

from __future__ import annotations

import os
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from adapterhub.errors import BadRequest, BlockDamaged, StorageFull, Unavailable, WrongBase
from adapterhub.swap.blobs import Named
from adapterhub.swap.block import Block, block_path, read_block
from adapterhub.swap.disk import DiskTier
from adapterhub.swap.policies import Policy, TierRules
from adapterhub.swap.ref import AdapterRef, Tier
from adapterhub.swap.store import Store
from tests.test_block import ORIGINALS, make_block

BASE = "f" * 64
SIZE = 4096 + 4096  # of a small block's file, at most


class FaultyFS(MemoryFileSystem):
    """An object store of its own, in memory, which fails when told to, and counts what is asked of it."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.store: dict[str, Any] = {}  # type: ignore[misc]
        self.pseudo_dirs = [""]  # type: ignore[misc]
        self.calls: Counter[str] = Counter()
        self.fault: Callable[[str], None] = lambda call: None
        self.cut: int | None = None  # bytes after which a download ends, as if that were all
        self.before_get: Callable[[], object] = lambda: None

    def get_file(self, rpath: str, lpath: str, **kwargs: Any) -> None:  # type: ignore[override]
        self._note("get")
        self.before_get()
        super().get_file(rpath, lpath, **kwargs)
        if self.cut is not None:
            os.truncate(lpath, self.cut)

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:  # type: ignore[override]
        self._note("put")
        super().put_file(lpath, rpath, **kwargs)

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        self._note("info")
        return super().info(path, **kwargs)

    def rm_file(self, path: str) -> None:
        self._note("rm")
        super().rm_file(path)

    def _note(self, call: str) -> None:
        self.calls[call] += 1
        self.fault(call)


def failing(error: Exception, *calls: str, times: int = 10**9) -> Callable[[str], None]:
    left = [times]

    def fault(call: str) -> None:
        if call in calls and left[0] > 0:
            left[0] -= 1
            raise error

    return fault


class Home:
    """A disk tier with a store, and what was published there."""

    def __init__(self, directory: Path, budget: int | None = None, *, store: bool = True) -> None:
        self.fs = FaultyFS()
        self.store = Store(self.fs, "/bucket/prefix", "faulty://bucket/prefix", pauses=(0, 0)) if store else None
        self.disk = DiskTier(directory / "blobs", budget, self.store)

    def publish(self, block: Block, owner: str = "mira") -> AdapterRef:
        """What the registry does, but for the rows."""
        with self.disk.holding(block.digest):
            self.disk.write(block, owner)
            if self.store:
                self.disk.upload(block.digest)
            self.disk.files.settle([Named(block.digest, owner, safe=self.store is not None)])
        return AdapterRef("v", block.digest, block.meta.nbytes, owner)

    def path(self, ref: AdapterRef) -> Path:
        return self.disk.files.path(ref.digest)

    def read(self, ref: AdapterRef, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        out = torch.zeros(ref.nbytes // dtype.itemsize, dtype=dtype)
        self.disk.read(ref, out, BASE)
        return out

    def names(self) -> set[str]:
        return {p.name for p in self.disk.files.directory.iterdir()}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


# -- finding and fetching


def test_a_block_without_a_file_is_remote_until_it_is_read(home: Home) -> None:
    block = make_block(source=ORIGINALS)
    ref = home.publish(block)
    assert home.disk.tier_of(ref.digest) is Tier.DISK
    home.disk.files.evict(1, "")
    assert (home.disk.tier_of(ref.digest), home.names()) == (Tier.REMOTE, set())
    assert torch.equal(home.read(ref), block.payload)
    assert home.disk.tier_of(ref.digest) is Tier.DISK
    assert read_block(home.path(ref)).source is not None
    home.disk.files.check_integrity()


def test_many_readers_of_one_remote_block_download_it_once(home: Home) -> None:
    block = make_block()
    ref = home.publish(block)
    home.disk.files.evict(1, "")
    together = threading.Barrier(8)

    def read(_: int) -> torch.Tensor:
        together.wait()
        return home.read(ref)

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(read, range(8)))
    assert all(torch.equal(payload, block.payload) for payload in found)
    assert home.fs.calls["get"] == 1


def test_what_is_on_the_disk_is_read_while_another_fetches(home: Home) -> None:
    near, far = home.publish(make_block(seed=1)), home.publish(make_block(seed=2))
    home.path(far).unlink()
    home.disk.files.forget(far.digest)
    arrived, go = threading.Event(), threading.Event()
    home.fs.before_get = lambda: (arrived.set(), go.wait(60))
    with ThreadPoolExecutor(1) as thread:
        slow = thread.submit(home.read, far)
        assert arrived.wait(60)
        assert torch.equal(home.read(near), make_block(seed=1).payload)
        assert not slow.done()
        go.set()
        assert torch.equal(slow.result(60), make_block(seed=2).payload)


def test_the_digest_is_checked_once_per_file_and_start(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    monkeypatch.setattr("adapterhub.swap.disk.check_digest", lambda *args: checked.append(args[-1]))
    ref = home.publish(make_block())
    for _ in range(3):
        home.read(ref)
    assert checked == [ref.digest]
    home.publish(make_block())
    home.read(ref)
    assert checked == [ref.digest] * 2, "it was written again"
    home.disk.files.evict(1, "")
    home.read(ref)
    assert checked == [ref.digest] * 2, "what was fetched was checked before it had its name"
    os.utime(home.path(ref), (0, 0))
    home.read(ref)
    assert checked == [ref.digest] * 3, "it may be another's by now"


# -- damage


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut off": lambda path: os.truncate(path, path.stat().st_size - 5),
    "empty": lambda path: path.write_bytes(b""),
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "another's": lambda path: path.write_bytes(block_path(path.parent, make_block(seed=9).digest).read_bytes()),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


def read_before(home: Home, ref: AdapterRef) -> None:
    """It was written long ago, and found good."""
    os.utime(home.path(ref), (0, 0))
    home.read(ref)


@pytest.mark.parametrize("read_first", [False, True], ids=["never read", "read before"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_set_aside_and_fails_its_own_readers_only(
    tmp_path: Path, damage: str, read_first: bool
) -> None:
    home = Home(tmp_path, store=False)
    other = home.publish(make_block(seed=9))
    ref = home.publish(make_block())
    if read_first:
        read_before(home, ref)
    DAMAGE[damage](home.path(ref))
    for _ in range(2):
        with pytest.raises(BlockDamaged, match="Import or train it again") as caught:
            home.read(ref)
        assert str(tmp_path) not in caught.value.message
    assert torch.equal(home.read(other), make_block(seed=9).payload)
    if damage != "a directory":
        assert [p.name for p in home.disk.files.quarantine.iterdir()] == [home.path(ref).name]
        assert "it was found damaged" in caught.value.message
        home.publish(make_block())
        assert torch.equal(home.read(ref), make_block().payload), "the same adapter, imported again"
        home.disk.files.check_integrity()


@pytest.mark.parametrize("read_first", [False, True], ids=["never read", "read before"])
@pytest.mark.parametrize("damage", [d for d in DAMAGE if d != "a directory"])
def test_with_a_store_a_damaged_file_is_fetched_again(home: Home, damage: str, read_first: bool) -> None:
    home.publish(make_block(seed=9))
    ref = home.publish(make_block(source=ORIGINALS))
    if read_first:
        read_before(home, ref)
    DAMAGE[damage](home.path(ref))
    assert torch.equal(home.read(ref), make_block().payload)
    assert home.disk.block(ref).source is not None
    assert home.fs.calls["get"] == 1


def test_a_file_that_was_deleted_is_damage_without_a_store_and_fetched_with_one(home: Home, tmp_path: Path) -> None:
    alone = Home(tmp_path / "alone", store=False)
    for place in (home, alone):
        ref = place.publish(make_block())
        place.path(ref).unlink()
    with pytest.raises(BlockDamaged, match="No such file"):
        alone.read(ref)
    assert torch.equal(home.read(ref), make_block().payload)


def test_what_is_made_for_another_base_or_type_is_not_set_aside(home: Home) -> None:
    ref = home.publish(make_block())
    with pytest.raises(WrongBase):
        home.disk.read(ref, torch.zeros(ref.nbytes // 2, dtype=torch.bfloat16), "e" * 64)
    with pytest.raises(BlockDamaged):
        home.read(ref, torch.float16)
    assert home.path(ref).exists()
    assert not home.disk.files.quarantine.exists()
    assert torch.equal(home.read(ref), make_block().payload)


# -- stores that fail


@pytest.mark.parametrize("cut", [0, 5, 5000])
def test_a_download_that_is_cut_off_is_never_taken_for_a_block(home: Home, cut: int) -> None:
    ref = home.publish(make_block(rank=60))
    home.disk.files.evict(1, "")
    home.fs.cut = cut
    with pytest.raises(BlockDamaged):
        home.read(ref)
    assert home.names() == set()
    home.fs.cut = None
    assert torch.equal(home.read(ref), make_block(rank=60).payload)


def test_a_store_that_fails_for_a_moment_is_asked_again(home: Home) -> None:
    ref = home.publish(make_block())
    home.disk.files.evict(1, "")
    home.fs.fault = failing(ConnectionError("reset"), "get", times=2)
    assert torch.equal(home.read(ref), make_block().payload)


def test_a_store_that_is_gone_fails_what_it_alone_has(home: Home) -> None:
    far, near = home.publish(make_block(seed=1)), home.publish(make_block(seed=2))
    home.path(far).unlink()
    home.disk.files.forget(far.digest)
    home.fs.fault = failing(TimeoutError("nobody there"), "get", "put", "info", "rm")
    with pytest.raises(Unavailable, match="does not answer"):
        home.read(far)
    assert torch.equal(home.read(near), make_block(seed=2).payload)
    with pytest.raises(Unavailable), home.disk.holding("x"):
        home.publish(make_block(seed=3))
    home.fs.fault = lambda call: None
    assert torch.equal(home.read(far), make_block(seed=1).payload)


def test_a_block_that_the_store_has_lost_is_damage(home: Home) -> None:
    ref = home.publish(make_block())
    home.disk.files.evict(1, "")
    home.fs.store.clear()
    with pytest.raises(BlockDamaged, match="nor in its object store"):
        home.read(ref)
    assert home.names() == set()


# -- budgets


def sizes(home: Home) -> list[int]:
    return [p.stat().st_size for p in home.disk.files.directory.iterdir()]


def test_without_a_store_a_full_budget_refuses_and_keeps_everything(tmp_path: Path) -> None:
    home = Home(tmp_path, store=False)
    refs = [home.publish(make_block(seed=seed)) for seed in range(3)]
    home.disk.set_budget(sum(sizes(home)) + 100)
    with pytest.raises(StorageFull, match="Delete adapters, or raise --disk-bytes"):
        home.publish(make_block(seed=4))
    home.publish(make_block(seed=0))  # replaces itself, which needs no more
    with pytest.raises(BadRequest, match="cannot be evicted"):
        home.disk.set_budget(sum(sizes(home)) - 1)
    assert all(home.path(ref).exists() for ref in refs)
    home.disk.remove(refs[0].digest)
    home.publish(make_block(seed=4))
    home.disk.files.check_integrity()


def test_as_a_cache_the_disk_evicts_what_was_read_longest_ago(tmp_path: Path) -> None:
    home = Home(tmp_path)
    refs = [home.publish(make_block(seed=seed)) for seed in range(3)]
    home.disk.set_budget(sum(sizes(home)))
    home.read(refs[0])
    refs.append(home.publish(make_block(seed=3)))
    assert [home.disk.tier_of(r.digest) for r in refs] == [Tier.DISK, Tier.REMOTE, Tier.DISK, Tier.DISK]
    home.disk.pin(refs[2].digest, True)
    home.disk.set_budget(2 * max(sizes(home)))
    assert [home.disk.tier_of(r.digest) for r in refs] == [Tier.REMOTE, Tier.REMOTE, Tier.DISK, Tier.DISK]
    for seed, ref in enumerate(refs):
        assert torch.equal(home.read(ref), make_block(seed=seed).payload)
    assert home.disk.tier_of(refs[2].digest) is Tier.DISK, "it is pinned"
    home.disk.files.check_integrity()
    stats = home.disk.stats()
    assert stats["disk"]["used_bytes"] == sum(sizes(home))
    assert stats["disk"]["evictions"] == home.disk.files.evictions > 0
    assert stats["store"]["loads"] == home.fs.calls["get"] == 3


def test_a_start_knows_what_was_read_longest_ago(tmp_path: Path) -> None:
    home = Home(tmp_path)
    refs = [home.publish(make_block(seed=seed)) for seed in range(3)]
    for age, ref in enumerate(refs):
        os.utime(home.path(ref), (1000 + age, 1000 + age))
    home.read(refs[0])
    again = DiskTier(tmp_path / "blobs", None, home.store)
    again.files.settle([Named(digest, "mira", safe=True) for digest in sorted(ref.digest for ref in refs)])
    for left in ([refs[0], refs[2]], [refs[0]]):
        assert again.files.evict(1, "")
        assert home.names() == {home.path(ref).name for ref in left}


def test_what_the_cache_could_not_hold_is_refused_and_evicts_nothing(tmp_path: Path) -> None:
    home = Home(tmp_path)
    refs = [home.publish(make_block(seed=seed)) for seed in range(2)]
    home.disk.set_budget(sum(sizes(home)))
    with pytest.raises(StorageFull):
        home.publish(make_block(rank=400))
    assert all(home.path(ref).exists() for ref in refs)


def test_a_block_that_is_not_in_the_store_yet_is_never_evicted(tmp_path: Path) -> None:
    home = Home(tmp_path)
    block = make_block()
    with home.disk.holding(block.digest):
        home.disk.write(block, "mira")
    home.disk.set_budget(sum(sizes(home)))
    with pytest.raises(StorageFull):
        home.publish(make_block(seed=1))
    home.disk.set_rules(TierRules(policy=Policy.SIEVE, ttl_seconds=1e-9))
    assert block_path(home.disk.files.directory, block.digest).exists()


def test_what_was_unused_for_too_long_goes_from_a_cache(home: Home) -> None:
    ref = home.publish(make_block())
    home.disk.set_rules(TierRules(ttl_seconds=1e-9))
    assert home.disk.tier_of(ref.digest) is Tier.REMOTE
    assert home.names() == set()


def test_a_block_in_somebodys_hands_is_not_evicted(tmp_path: Path) -> None:
    home = Home(tmp_path)
    ref = home.publish(make_block())
    with home.disk.holding(ref.digest):
        assert not home.disk.files.evict(1, "")
    assert home.disk.files.evict(1, "")


# -- a disk that is really full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a file system of its own cannot be mounted: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_refuses_a_block_and_leaves_nothing_behind(small_disk: Path) -> None:
    home = Home(small_disk, store=False)
    ref = home.publish(make_block())
    before = home.names()
    with pytest.raises(StorageFull, match="no room on the server's disk"):
        home.publish(make_block(rank=5000))
    assert home.names() == before
    assert torch.equal(home.read(ref), make_block().payload)
    home.publish(make_block(seed=1))
    home.disk.files.check_integrity()


def test_a_cache_on_a_full_disk_evicts_until_there_is_room(small_disk: Path) -> None:
    home = Home(small_disk)
    refs = [home.publish(make_block(seed=seed, rank=500)) for seed in range(12)]
    home.disk.files.check_integrity()
    assert home.disk.files.evictions > 0
    for seed, ref in enumerate(refs):
        assert torch.equal(home.read(ref), make_block(seed=seed, rank=500).payload)
    (small_disk / "filler").write_bytes(b"x" * 1024)
    with pytest.raises(StorageFull):
        home.publish(make_block(rank=9000))


# -- anything in any order, against a model


BLOCKS = [make_block(seed=seed, rank=1 + 40 * (seed % 3)) for seed in range(6)]


class DiskMachine(RuleBasedStateMachine):
    """A disk tier with a store that fails now and then, beside the set of blocks that were acknowledged."""

    @initialize(tmp=st.none())
    def begin(self, tmp: None) -> None:
        import tempfile

        self._directory = tempfile.TemporaryDirectory()
        self.home = Home(Path(self._directory.name), 60_000)
        self.published: dict[int, AdapterRef] = {}

    @rule(which=st.integers(0, 5), fails=st.sampled_from(["", "put", "info"]), times=st.sampled_from([1, 99]))
    def publish(self, which: int, fails: str, times: int) -> None:
        self.home.fs.fault = failing(ConnectionError("cut"), fails, times=times)
        try:
            ref = self.home.publish(BLOCKS[which])
            self.published[which] = ref
        except (Unavailable, StorageFull):
            with self.home.disk.holding(BLOCKS[which].digest):
                if which not in self.published:
                    self.home.disk.remove(BLOCKS[which].digest)
                else:  # the registry's mirror brings it back in line
                    self.home.fs.fault = lambda call: None
                    self.publish_again(which)
        finally:
            self.home.fs.fault = lambda call: None

    def publish_again(self, which: int) -> None:
        self.home.publish(BLOCKS[which])

    @rule(which=st.integers(0, 5), fails=st.booleans(), cut=st.sampled_from([None, None, 0, 4100]))
    def read(self, which: int, fails: bool, cut: int | None) -> None:
        if which not in self.published:
            return
        ref = self.published[which]
        remote = self.home.disk.tier_of(ref.digest) is Tier.REMOTE or not self.home.path(ref).exists()
        self.home.fs.fault = failing(TimeoutError("slow"), "get") if fails else lambda call: None
        self.home.fs.cut = cut
        try:
            assert torch.equal(self.home.read(ref), BLOCKS[which].payload)
        except Unavailable:
            assert fails
        except BlockDamaged:
            assert cut is not None
        finally:
            self.home.fs.fault = lambda call: None
            self.home.fs.cut = None
        if remote and (fails or cut is not None):
            assert not self.home.path(ref).exists()
        assert torch.equal(self.home.read(ref), BLOCKS[which].payload), "with the store well again"

    @rule(which=st.integers(0, 5), how=st.sampled_from(["cut off", "empty", "flipped"]))
    def damage(self, which: int, how: str) -> None:
        if which in self.published and self.home.path(self.published[which]).exists():
            DAMAGE[how](self.home.path(self.published[which]))
            self.home.disk._verified.pop(self.published[which].digest, None)  # as after a start
            assert torch.equal(self.home.read(self.published[which]), BLOCKS[which].payload)

    @rule(which=st.integers(0, 5))
    def delete(self, which: int) -> None:
        if (ref := self.published.pop(which, None)) is not None:
            self.home.disk.remove(ref.digest)
            assert self.home.store is not None
            self.home.store.delete(ref.digest)
            with pytest.raises(BlockDamaged):
                self.home.read(ref)

    @rule(budget=st.sampled_from([25_000, 40_000, 60_000]))
    def set_budget(self, budget: int) -> None:
        self.home.disk.set_budget(budget)

    @rule(policy=st.sampled_from(list(Policy)))
    def set_rules(self, policy: Policy) -> None:
        self.home.disk.set_rules(TierRules(policy=policy))

    @invariant()
    def everything_adds_up(self) -> None:
        if hasattr(self, "home"):
            self.home.disk.files.check_integrity()
            names = {p.name for p in self.home.disk.files.directory.iterdir()}
            assert names <= {f"{ref.digest}.block" for ref in self.published.values()}

    def teardown(self) -> None:
        if hasattr(self, "home"):
            self._directory.cleanup()


TestAnyOrder = DiskMachine.TestCase
TestAnyOrder.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
