"""The directory of block files: which there are, the bytes they take, and how room is made for one more.

Files that could be had again (`settle`) go, as the rules say, when another needs their room; all others stay until they
are removed. A file is never evicted while somebody holds its digest (`holding`); one that is open is read to its end.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from adapterhub.config import format_bytes
from adapterhub.errors import BadRequest, StorageFull
from adapterhub.swap.block import SUFFIX, block_path
from adapterhub.swap.files import remove_partials, sync_directory
from adapterhub.swap.locks import KeyedLocks
from adapterhub.swap.policies import Item, Keeper, TierRules

log = logging.getLogger(__name__)
_USE_SECONDS = 60.0  # uses of a file that are closer to each other are one, to a later start


class Named(NamedTuple):
    """A block that a row names. `safe`: the store has it, so that its file may go."""

    digest: str
    owner: str
    pinned: bool = False
    safe: bool = False


class Blobs:
    """Safe to use from any thread. `budget` bounds the files in all; None: the disk alone does."""

    def __init__(self, directory: Path, budget: int | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.directory = directory
        self.budget = budget
        self.evictions = 0
        self._mutex = threading.RLock()
        self._locks = KeyedLocks(self._mutex)
        self._claimed = 0  # bytes that are being written
        self._keeper = Keeper()  # of all files
        self._safe: set[str] = set()  # which of them may be evicted
        self._pins: dict[str, bool] = {}  # what was last said of a block: who settles it may know less
        for name, size, _ in sorted(_files(directory), key=lambda found: found[2]):
            self._count(Named(name.removesuffix(SUFFIX), ""), size)

    def __contains__(self, digest: str) -> bool:
        return digest in self._keeper

    def __len__(self) -> int:
        return len(self._keeper)

    @property
    def used_bytes(self) -> int:
        return self._keeper.used_bytes

    @property
    def pinned(self) -> int:
        return self._keeper.pinned

    def path(self, digest: str) -> Path:
        return block_path(self.directory, digest)

    def holding(self, digest: str) -> AbstractContextManager[None]:
        """Within this block nobody else writes, removes, evicts or sets aside the file of `digest`."""
        return self._locks.holding(digest)

    # -- coming and going; the caller holds the digest

    @contextmanager
    def adding(self, digest: str, nbytes: int, owner: str) -> Iterator[Path]:
        """Makes room for `nbytes`, then lets the caller put a file of about that size at the path.

        Raises StorageFull when there is no room, and none can be made.
        """
        with self._mutex:
            claim = max(0, nbytes - self._size(digest))
            self._make_room(claim, owner)
            self._claimed += claim
        path = self.path(digest)
        try:
            yield path
        finally:
            with self._mutex:
                self._claimed -= claim
        with self._mutex:
            self._count(Named(digest, owner), path.stat().st_size)
            self.obey()  # it may be larger than was said

    def settle(self, named: Iterable[Named]) -> None:
        """What rows say of files: whose they are, and which may be evicted from now on. Those without a file are
        left out."""
        with self._mutex:
            here = [block for block in named if block.digest in self._keeper]
            for block in sorted(here, key=lambda block: self._keeper.last_use(block.digest)):  # that stays their order
                self._count(block, self._size(block.digest))
            self.obey()

    def touch(self, digest: str) -> None:
        """It was read."""
        with self._mutex:
            if digest in self._keeper:
                self._keeper.touch(digest, time.monotonic())
            evictable = digest in self._safe
        if evictable:
            _note_use(self.path(digest))

    def pin(self, digest: str, pinned: bool) -> None:
        with self._mutex:
            self._pins[digest] = pinned
            if digest in self._keeper:
                self._keeper.pin(digest) if pinned else self._keeper.unpin(digest, time.monotonic())

    def remove(self, digest: str) -> None:
        """Removes the file, and one of its name that was set aside."""
        self.set_aside_path(digest).unlink(missing_ok=True)
        with self._mutex:
            self._drop(digest)
            self._pins.pop(digest, None)
        sync_directory(self.directory)

    def forget(self, digest: str) -> None:
        """Its file turned out to be gone."""
        with self._mutex:
            self._uncount(digest)

    # -- damage

    @property
    def quarantine(self) -> Path:
        return self.directory.with_name("quarantine")

    def set_aside_path(self, digest: str) -> Path:
        return block_path(self.quarantine, digest)

    def set_aside(self, digest: str) -> None:
        """Moves a damaged file out of the way, to where an operator may look at it."""
        path = self.path(digest)
        with self._mutex:
            try:
                if stat.S_ISREG(path.lstat().st_mode):
                    self.quarantine.mkdir(mode=0o700, exist_ok=True)
                    path.replace(self.set_aside_path(digest))
                    log.error("%s is damaged: it was moved to %s", path, self.quarantine)
            except FileNotFoundError:
                pass
            self._uncount(digest)

    # -- what operators do

    def clean_up(self, named: set[str]) -> int:
        """Removes what an interrupted write has left, and files of blocks that are not `named`; returns how many."""
        removed = remove_partials(self.directory)
        with self._mutex:
            unnamed = [digest for digest in self._keeper if digest not in named]
            for digest in unnamed:
                self._drop(digest)
        sync_directory(self.directory)
        aside = [path for path in self.quarantine.glob(f"*{SUFFIX}") if path.stem not in named]
        for path in aside:
            path.unlink()
        return removed + len(unnamed) + len(aside)

    def set_budget(self, budget: int) -> None:
        """Evicts what no longer fits. Raises BadRequest, and changes nothing, when what must stay does not fit."""
        with self._mutex:
            gone = self.over(budget)
            self.budget = budget
            self._evict(gone)

    def over(self, budget: int) -> list[str]:
        """What would go for another budget. Raises BadRequest when what must stay does not fit."""
        with self._mutex:
            gone = self._keeper.unlawful(time.monotonic(), budget - self._claimed, self._evictable)
            if gone is None:
                raise BadRequest(
                    f"The block files that cannot be evicted from the disk do not fit into {format_bytes(budget)}: "
                    f"{format_bytes(self.used_bytes)} are in use. Delete adapters first, or choose a larger budget."
                )
            return gone

    def set_rules(self, rules: TierRules) -> None:
        with self._mutex:
            self._keeper = self._keeper.with_rules(rules)
            self.obey()

    def plan(self, rules: TierRules) -> list[tuple[str, int]]:
        """Digest and bytes of what would go at once under other rules."""
        with self._mutex:
            keeper = self._keeper.with_rules(rules)
            return [(digest, keeper.item(digest).size) for digest in self._unlawful(keeper)]

    def obey(self) -> None:
        """Evicts what budget and rules let go of at once, such as what was not used for too long."""
        with self._mutex:
            self._evict(self._unlawful(self._keeper))

    def evict(self, nbytes: int, owner: str) -> bool:
        """Makes a disk that is full before the budget is reached emptier by `nbytes`; False when nothing may go."""
        with self._mutex:
            chosen = self._first(self._keeper, nbytes, owner)
            self._evict(chosen)
            return bool(chosen)

    def evict_file(self, digest: str) -> bool:
        """Evicts that file, if there is one, even a pinned one; False when it must stay: the store does not have it
        yet, or somebody holds it."""
        with self._mutex:
            if digest not in self._keeper:
                return True
            if not self._evictable(digest):
                return False
            self._evict([digest])
            return True

    def check_integrity(self) -> None:
        """Raises AssertionError unless the numbers are those of the files. Nothing may be under way."""
        found = {name.removesuffix(SUFFIX): size for name, size, _ in _files(self.directory)}
        assert {key: self._size(key) for key in self._keeper} == found, "the files are others than are counted"
        assert self._claimed == 0, "room that was claimed is still claimed"
        assert self.budget is None or self.used_bytes <= self.budget, "the files are over their budget"
        self._keeper.check_integrity()

    # -- with the mutex held

    def _make_room(self, nbytes: int, owner: str) -> None:
        if self.budget is None:
            return
        gone = self._keeper.room(Item("", nbytes, owner), self.budget - self._claimed, self._evictable)
        if gone is None:
            raise StorageFull(
                f"Of {format_bytes(self.budget)} for adapters {format_bytes(self.used_bytes)} are in use, and "
                f"this one needs {format_bytes(nbytes)}. Delete adapters, or raise --disk-bytes."
            )
        self._evict(gone)

    def _unlawful(self, keeper: Keeper) -> list[str]:
        """What budget and the keeper's rules let go of at once; where not all of the excess may go, what may."""
        budget = keeper.used_bytes if self.budget is None else self.budget - self._claimed
        gone = keeper.unlawful(time.monotonic(), budget, self._evictable)
        return self._first(keeper, keeper.used_bytes - budget, "") if gone is None else gone

    def _first(self, keeper: Keeper, nbytes: int, owner: str) -> list[str]:
        """What goes first, as much of it as has `nbytes`."""
        chosen: list[str] = []
        for digest in keeper.victims(owner, self._evictable):
            if nbytes <= 0:
                break
            chosen.append(digest)
            nbytes -= self._size(digest)
        return chosen

    def _evictable(self, digest: str) -> bool:
        return digest in self._safe and not self._locks.busy(digest)

    def _evict(self, digests: Iterable[str]) -> None:
        for digest in digests:
            self._keeper.evict(digest)
            self._drop(digest)
            self.evictions += 1

    def _drop(self, digest: str) -> None:
        self.path(digest).unlink(missing_ok=True)
        self._uncount(digest)

    def _size(self, digest: str) -> int:
        return self._keeper.item(digest).size if digest in self._keeper else 0

    def _count(self, block: Named, size: int) -> None:
        digest = block.digest
        pinned = self._pins.get(digest, block.pinned or (digest in self._keeper and self._keeper.is_pinned(digest)))
        self._uncount(digest)
        self._keeper.insert(Item(digest, size, block.owner), time.monotonic(), pinned=pinned)
        if block.safe:
            self._safe.add(digest)

    def _uncount(self, digest: str) -> None:
        if digest in self._keeper:
            self._keeper.remove(digest)
        self._safe.discard(digest)


def _files(directory: Path) -> Iterator[tuple[str, int, float]]:
    """Name, bytes and time of last change or use of each block file."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.endswith(SUFFIX) and entry.is_file(follow_symlinks=False):
                found = entry.stat(follow_symlinks=False)
                yield entry.name, found.st_size, max(found.st_mtime, found.st_atime)


def _note_use(path: Path) -> None:
    """For the order after the next start, in the file itself: not every file system notes when a file was read."""
    with suppress(OSError):  # it was evicted, or is another's
        found = path.stat()
        if time.time() - found.st_atime > _USE_SECONDS:
            os.utime(path, ns=(time.time_ns(), found.st_mtime_ns))
