"""The disk below the tiers in memory, and the object store below it: blocks come whole and checked, or fail clearly.

Without a store the block files are the truth. With one they are a cache: a block that has no file is fetched first, by
one thread however many ask for it. A file is checked against its digest when it is read first, and again when it is no
longer the same file; a damaged one is set aside, and with a store fetched again.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import torch

from adapterhub.errors import BlockDamaged, StorageFull, Unavailable, WrongBase
from adapterhub.swap.blobs import Blobs, Named
from adapterhub.swap.block import (
    Block,
    BlockMeta,
    block_chunks,
    check_digest,
    damaged,
    read_header,
    read_open_block,
    read_payload,
    verify_block,
)
from adapterhub.swap.files import becoming, write_durably
from adapterhub.swap.latency import Latencies
from adapterhub.swap.policies import TierRules
from adapterhub.swap.ref import AdapterRef, Tier
from adapterhub.swap.store import Store

T = TypeVar("T")
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # what a process may run out of without any file being wrong
_DOWNLOADS = 2  # one that is not what it should be may have been cut off
log = logging.getLogger(__name__)


class Elsewhere(Exception):
    """There is no good file of the block here: the store is to be asked."""


class Stamp(NamedTuple):
    """What tells a file from another that took its place, or that was written to since."""

    inode: int
    nbytes: int
    mtime_ns: int

    @classmethod
    def of(cls, file: BinaryIO) -> Stamp:
        found = os.fstat(file.fileno())
        return cls(found.st_ino, found.st_size, found.st_mtime_ns)


class DiskTier:
    """`tier_of` and `stats` never wait, so that the engine's thread may ask; everything else is for other threads."""

    def __init__(self, blobs: Path, budget: int | None = None, store: Store | None = None) -> None:
        """`budget` bounds the block files in bytes; None: the disk alone does."""
        self.files = Blobs(blobs, budget)
        self.store = store
        self._verified: dict[str, Stamp] = {}  # digest -> the file that was checked, once per file and start
        self._loads = Latencies()
        self._fetches = Latencies()
        self._counting = threading.Lock()

    def tier_of(self, digest: str) -> Tier:
        """Where a read would find the block."""
        return Tier.DISK if self.store is None or digest in self.files else Tier.REMOTE

    def holding(self, digest: str) -> AbstractContextManager[None]:
        """Within this block nobody else writes, fetches, evicts or removes the file of `digest`."""
        return self.files.holding(digest)

    # -- reading

    def read(self, ref: AdapterRef, out: torch.Tensor, fingerprint: str) -> BlockMeta:
        """Reads the payload into `out`, a contiguous CPU tensor of the block's size: one read, no copy in between.

        Raises BlockDamaged; WrongBase when the block does not belong to the base of that fingerprint; Unavailable when
        the store does not answer.
        """
        return self._whole(ref, self._into(ref, out, fingerprint))

    def read_here(self, ref: AdapterRef, out: torch.Tensor, fingerprint: str) -> BlockMeta:
        """`read`, but where that would ask the store, it raises Elsewhere: who comes next need not wait for that."""
        if self.store is None:
            return self.read(ref, out, fingerprint)
        try:
            return self._look(ref, self._into(ref, out, fingerprint))
        except BlockDamaged as error:
            raise Elsewhere(error.message) from error

    def fetch(self, ref: AdapterRef) -> None:
        """Brings the block from the store to the disk, unless a good file of it is there. Raises BlockDamaged when the
        store does not have it either, Unavailable when it does not answer, or the disk is full."""
        with self.holding(ref.digest):
            self._mend(ref)

    def _into(self, ref: AdapterRef, out: torch.Tensor, fingerprint: str) -> Callable[[BinaryIO, Path], BlockMeta]:
        def look(file: BinaryIO, path: Path) -> BlockMeta:
            stamp = Stamp.of(file)  # before anything is read: what is written meanwhile is checked the next time
            header = read_header(file, path)
            if header.digest != ref.digest:
                raise damaged(path, f"it holds another adapter, {header.digest[:12]}")
            if header.meta.fingerprint != fingerprint:
                raise WrongBase(
                    f"This adapter was made for base {header.meta.fingerprint[:12]}; this server runs base "
                    f"{fingerprint[:12]}. Start the server with the other base, or train the adapter again."
                )
            if header.meta.dtype != out.dtype or header.meta.nbytes != ref.nbytes:
                raise damaged(path, f"it holds {header.meta.nbytes} bytes of {header.meta.dtype}")
            read_payload(file, path, header, out)
            if self._verified.get(ref.digest) != stamp:
                check_digest(path, header, out, ref.digest)
                self._verified[ref.digest] = stamp
            return header.meta

        return look

    def block(self, ref: AdapterRef) -> Block:
        """The whole block, checked. Raises BlockDamaged, or Unavailable when the store does not answer."""
        return self._whole(ref, read_open_block)

    def verify(self, ref: AdapterRef) -> None:
        """Reads all of the local file, if there is one, and mends it if it can. Raises BlockDamaged, or Unavailable."""
        if self.files.path(ref.digest).exists():
            self._whole(ref, verify_block)

    def _whole(self, ref: AdapterRef, look: Callable[[BinaryIO, Path], T]) -> T:
        if not self.files.path(ref.digest).exists():
            with self.holding(ref.digest):
                self._fetch_missing(ref)
        try:
            return self._look(ref, look)
        except BlockDamaged:
            with self.holding(ref.digest):  # so that it stays until it is read
                self._mend(ref)
                return self._look(ref, look)

    def _look(self, ref: AdapterRef, look: Callable[[BinaryIO, Path], T]) -> T:
        path = self.files.path(ref.digest)
        started = time.perf_counter()
        try:
            with path.open("rb", buffering=0) as file:  # once it is open, its eviction does not disturb
                seen = look(file, path)
        except OSError as error:
            if error.errno in _EXHAUSTED:
                raise Unavailable(f"The server cannot open another file: {error.strerror}. Try again.") from error
            raise damaged(path, error.strerror or str(error)) from error
        self.files.touch(ref.digest)
        with self._counting:
            self._loads.add((time.perf_counter() - started) * 1e3)
        return seen

    # -- what the holder of a digest does

    def _mend(self, ref: AdapterRef) -> None:
        """Looks whether the file is damaged as it is now; then sets it aside, and fetches it again.

        Raises BlockDamaged when there is no good file in the end.
        """
        path = self.files.path(ref.digest)
        try:
            with path.open("rb", buffering=0) as file:
                verify_block(file, path)
        except FileNotFoundError:
            self._fetch_missing(ref)
        except (BlockDamaged, OSError) as error:
            self._verified.pop(ref.digest, None)
            self.files.set_aside(ref.digest)
            if self.store is None:
                raise error if isinstance(error, BlockDamaged) else damaged(path, str(error.strerror)) from error
            self._fetch_missing(ref)

    def _fetch_missing(self, ref: AdapterRef) -> None:
        """Downloads the block unless another has done so by now, and checks it before it has its name."""
        path = self.files.path(ref.digest)
        if path.exists():
            return
        self.files.forget(ref.digest)
        store = self.store
        if store is None:
            missing = (
                "it was found damaged" if self.files.set_aside_path(ref.digest).exists() else os.strerror(errno.ENOENT)
            )
            raise damaged(path, missing)
        started = time.perf_counter()
        try:
            with self.files.adding(ref.digest, ref.nbytes, ref.owner):
                stamp = self._while_full(ref.nbytes, ref.owner, lambda: self._download(store, ref))
        except StorageFull as error:
            raise Unavailable(f"The adapter has no room on the server's disk: {error}", code="disk_full") from error
        self._verified[ref.digest] = stamp
        self.files.settle([Named(ref.digest, ref.owner, ref.pinned, safe=True)])
        with self._counting:
            self._fetches.add((time.perf_counter() - started) * 1e3)

    def _download(self, store: Store, ref: AdapterRef) -> Stamp:
        digest, path = ref.digest, self.files.path(ref.digest)
        with becoming(path) as partial:
            for left in reversed(range(_DOWNLOADS)):
                if not store.get(digest, partial, ref.nbytes):
                    raise damaged(path, "it is neither on the server's disk nor in its object store")
                try:
                    with partial.open("rb", buffering=0) as file:
                        verify_block(file, path)
                        return Stamp.of(file)
                except BlockDamaged:
                    log.warning("store %s: what came of %s is not what its digest promises", store.url, digest[:12])
                    if not left:
                        raise
        raise AssertionError("the last download returns or raises")

    def write(self, block: Block, owner: str) -> None:
        """Writes the block's file, synced. Whoever calls this holds the digest, until the block is named and settled.

        Raises StorageFull when the disk or the budget is full; nothing is left behind then.
        """
        chunks = block_chunks(block)
        size = sum(len(chunk) for chunk in chunks)
        with self.files.adding(block.digest, size, owner) as path:
            self._while_full(size, owner, lambda: write_durably(path, *chunks))
        self._verified.pop(block.digest, None)

    def upload(self, digest: str) -> None:
        """Brings the file into the store. Raises Unavailable, or StorageFull when the store is full."""
        assert self.store is not None
        self.store.put(digest, self.files.path(digest))

    def remove(self, digest: str) -> None:
        """Removes the file, not what lies in the store."""
        self._verified.pop(digest, None)
        self.files.remove(digest)

    def _while_full(self, nbytes: int, owner: str, write: Callable[[], T]) -> T:
        """A disk may be full before the budget is reached: then what can be had again makes room."""
        while True:
            try:
                return write()
            except StorageFull:
                if not self.files.evict(nbytes, owner):
                    raise

    # -- what operators do

    def set_budget(self, budget: int) -> None:
        """Evicts what no longer fits. Raises BadRequest, and changes nothing, when what must stay does not fit."""
        self.files.set_budget(budget)

    def pin(self, digest: str, pinned: bool) -> None:
        """What is pinned stays on the disk, too, whether it is there now or comes later."""
        self.files.pin(digest, pinned)

    def set_rules(self, rules: TierRules) -> None:
        self.files.set_rules(rules)

    def plan(self, rules: TierRules) -> list[tuple[str, int]]:
        """Digest and bytes of the files that `set_rules` would evict now."""
        return self.files.plan(rules)

    def close(self) -> None:
        """Whoever waits for the store is let go: it may never answer."""
        if self.store is not None:
            self.store.close()

    def stats(self) -> dict[str, dict[str, Any]]:
        """ "disk", and "store" where there is one."""
        with self._counting:
            loads, fetches = self._loads.count, self._fetches.count
        hits = max(0, loads - fetches)
        tiers: dict[str, dict[str, Any]] = {
            "disk": {
                "budget_bytes": self.files.budget,
                "used_bytes": self.files.used_bytes,
                "adapters": len(self.files),
                "pinned": self.files.pinned,
                "hits": hits,
                "hit_ratio": hits / loads if loads else None,
                "evictions": self.files.evictions,
                "loads": loads,
                "load_ms": self._loads.summary(),
            }
        }
        if self.store is not None:
            tiers["store"] = {"url": self.store.url, "loads": fetches, "load_ms": self._fetches.summary()}
        return tiers
