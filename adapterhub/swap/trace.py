"""The trace: every use of an adapter, kept compactly in a bounded number of bytes, so that a policy can be judged on
what users did.

`Recorder.record` only appends to a queue in memory; one thread writes what has gathered, a few times a second, as one
frame at the end of a file:

    file   "ahtrace1", then frames
    frame  crc32 of the body, bytes of the adapters' JSON, number of uses (three little-endian uint32), then the body:
           [[version, digest, owner, bytes], ...] of the adapters that this file has not named yet, as JSON;
           the uses as packed records of 17 bytes: time, number of the adapter in this file, milliseconds to load, tier

A fixed record is what can be written without thought and read a million at a time; what is long (ids, digests) is said
once per file. Each file tells all it needs, so that the oldest can be removed when the whole grows over its bound, and
one owner's uses be taken out of a file without a look at the others. A frame that a kill cut off ends its file: readers
ignore it, and each start of the server begins a new file. Nothing is synced: a loss of power may take the last seconds,
a `kill -9` at most those that were not written yet.
"""

from __future__ import annotations

import json
import logging
import struct
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adapterhub.config import MIB
from adapterhub.errors import StorageFull
from adapterhub.swap.files import remove_partials, write_durably
from adapterhub.swap.ref import Tier, Use

log = logging.getLogger(__name__)

SUFFIX = ".trace"
MAGIC = b"ahtrace1"
MAX_BYTES = 64 * MIB  # of all files together; about 3.5 million uses
MAX_PENDING = 65_536  # uses that wait to be written; one more is dropped
_FILES = 8  # the bound is shared by about that many files: how much goes when the oldest goes
_LEAST = 4096  # bytes that a file counts for at least: what it takes of a disk
_FRAME_USES = 1024  # at most: little enough to be made between two steps of the engine
_WRITE_SECONDS = 0.25  # how often what has gathered is written
_PAUSE_SECONDS = 10.0  # after a write that failed
_FRAME = struct.Struct("<III")
_TIERS = (Tier.DEVICE, Tier.RAM, Tier.DISK, Tier.REMOTE)
_CODES = {tier: code for code, tier in enumerate(_TIERS)}
_USE = np.dtype([("time", "<f8"), ("adapter", "<u4"), ("load_ms", "<f4"), ("tier", "u1")])


class Adapter(NamedTuple):
    """What does not change from one use of a version to the next."""

    version: str
    digest: str
    owner: str
    nbytes: int


@dataclass(frozen=True)
class Trace:
    """Uses in the order of their times: use i is of `adapters[adapter[i]]`."""

    adapters: Sequence[Adapter]
    time: NDArray[np.float64]  # [uses] seconds since the epoch
    adapter: NDArray[np.int64]  # [uses] index into `adapters`
    tier: NDArray[np.uint8]  # [uses] where it was found, as a number of `TIERS`
    load_ms: NDArray[np.float32]  # [uses]

    TIERS = _TIERS

    def __len__(self) -> int:
        return len(self.time)

    def __iter__(self) -> Iterator[Use]:
        columns = (self.time.tolist(), self.adapter.tolist(), self.tier.tolist(), self.load_ms.tolist())
        for when, index, tier, load_ms in zip(*columns, strict=True):
            version, digest, owner, nbytes = self.adapters[index]
            yield Use(when, version, digest, owner, nbytes, _TIERS[tier], load_ms)


def read_trace(directory: Path) -> Trace:
    """All that `directory` holds, also while a server writes there. Empty when there is no such directory."""
    numbers: dict[Adapter, int] = {}
    parts = [np.empty(0, _USE)]
    for path in _files(directory):
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # rotated away at this moment
            continue
        names: list[int] = []  # number in this file -> number in all
        for adapters, uses in _frames(content):
            names += [numbers.setdefault(adapter, len(numbers)) for adapter in adapters]
            uses = uses.copy()
            uses["adapter"] = np.array(names, np.uint32)[uses["adapter"]]
            parts.append(uses)
    uses = np.concatenate(parts)
    uses = uses[np.argsort(uses["time"], kind="stable")]
    return Trace(list(numbers), uses["time"], uses["adapter"].astype(np.int64), uses["tier"], uses["load_ms"])


def erase_owner(directory: Path, owner: str) -> int:
    """Rewrites every file of `directory` that names `owner` without their uses; returns how many uses that were.

    For a directory that no recorder has open; one that is asks its `Recorder.erase`. A file that there is no room to
    rewrite is removed: that nothing of the owner stays counts for more than the others' uses in it. Killed in the
    middle, it can be called again.
    """
    remove_partials(directory)
    erased = 0
    for path in _files(directory):
        content = path.read_bytes()
        kept, count = _without(content, owner)
        if kept == content:
            continue
        erased += count
        try:
            write_durably(path, kept)
        except StorageFull:
            log.warning("no room to rewrite %s without an owner: it is removed", path)
            path.unlink()
    return erased


class Recorder:
    """Writes the trace of one server to `directory`, in at most `max_bytes` (1 MiB or more). `record` is for one
    thread, the rest for any."""

    def __init__(self, directory: Path, max_bytes: int = MAX_BYTES, max_pending: int = MAX_PENDING) -> None:
        self.directory = directory
        self.max_bytes = max_bytes
        self._pending: deque[Use] = deque()
        self._max_pending = max_pending
        self._overflowed = 0  # counted by the thread that records
        self._unwritten = 0  # counted under `_writing`
        self._recorded = 0
        self._writing = threading.Lock()  # of the files, and of what is known of them
        self._file: _File | None = None
        self._paused_until: float | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="adapterhub-trace", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def record(self, use: Use) -> None:
        """Never waits: a use that finds the queue full is counted as dropped."""
        if len(self._pending) >= self._max_pending:
            self._overflowed += 1
        else:
            self._pending.append(use)

    @property
    def dropped(self) -> int:
        """Uses that were not recorded since the start: the queue was full, or the disk."""
        return self._overflowed + self._unwritten

    def stats(self) -> dict[str, Any]:
        """For operators: what the trace takes of the disk, and whether it misses anything."""
        with self._writing:
            return {
                "bytes": sum(size for _, size in _sizes(self.directory)),
                "max_bytes": self.max_bytes,
                "recorded": self._recorded,
                "dropped": self.dropped,
                "paused": self._paused_until is not None,
            }

    def flush(self) -> None:
        """Writes what has gathered, unless recording is paused."""
        with self._writing:
            self._write_pending()

    def erase(self, owner: str) -> int:
        """Takes all uses of `owner` out of the files, and out of what was not written yet; returns how many."""
        with self._writing:
            waiting = [self._pending.popleft() for _ in range(len(self._pending))]
            kept = [use for use in waiting if use.owner != owner]
            self._pending.extendleft(reversed(kept))
            if self._file is not None:  # it goes on in a new one
                self._file.close()
                self._file = None
            return len(waiting) - len(kept) + erase_owner(self.directory, owner)

    def close(self) -> None:
        """Writes the rest and ends the thread."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._writing:
            self._write_pending()
            if self._file is not None:
                self._file.close()
                self._file = None

    def _loop(self) -> None:
        while not self._closing.wait(_WRITE_SECONDS):
            self.flush()

    def _write_pending(self) -> None:
        if self._paused_until is not None and time.monotonic() < self._paused_until:
            return
        while self._pending:
            uses = [self._pending.popleft() for _ in range(min(len(self._pending), _FRAME_USES))]
            try:
                self._write(uses)
            except OSError as error:
                self._unwritten += len(uses)
                if self._paused_until is None:
                    log.warning("the trace cannot be written (%s): recording pauses, serving goes on", error)
                self._paused_until = time.monotonic() + _PAUSE_SECONDS
                return
            if self._paused_until is not None:
                log.info("the trace can be written again; %d uses are missing from it", self.dropped)
                self._paused_until = None
            self._recorded += len(uses)

    def _write(self, uses: list[Use]) -> None:
        """Adds a frame, in a new file when this one is full, and removes the oldest until all is within its bound."""
        if self._file is None or self._file.size >= self.max_bytes // _FILES:
            if self._file is not None:
                self._file.close()
                self._file = None
            self._file = _File.create(self.directory)
        frame = self._file.frame(uses)
        sizes = _sizes(self.directory)
        total = sum(size for _, size in sizes) + len(frame)
        for path, size in sizes:
            if total <= self.max_bytes or path == self._file.path:
                break
            path.unlink(missing_ok=True)
            total -= size
        try:
            self._file.append(frame)
        except OSError:
            self._file.abandon()
            self._file = None
            raise


@dataclass
class _File:
    """A file that is being written, and the adapters it has named."""

    path: Path
    handle: BinaryIO
    size: int = 0
    numbers: dict[Adapter, int] = field(default_factory=dict)

    @classmethod
    def create(cls, directory: Path) -> _File:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        last = max((int(path.stem) for path in _files(directory)), default=0)
        path = directory / f"{last + 1:010d}{SUFFIX}"
        handle = path.open("xb", buffering=0)
        path.chmod(0o600)
        file = cls(path, handle)
        try:
            file.append(MAGIC)
        except OSError:
            file.abandon()
            raise
        return file

    def frame(self, uses: list[Use]) -> bytes:
        known = len(self.numbers)
        records = [
            (use.time, self.numbers.setdefault(Adapter(*use[1:5]), len(self.numbers)), use.load_ms, _CODES[use.tier])
            for use in uses
        ]
        return _pack(list(self.numbers)[known:], np.array(records, _USE))

    def append(self, content: bytes) -> None:
        written = self.handle.write(content)
        if written != len(content):  # what fits of it, on a disk that is full
            self.handle.write(content[written:])  # says why
        self.size += len(content)

    def abandon(self) -> None:
        """After a write that failed: nothing of it stays, nor a file that holds nothing else."""
        with suppress(OSError):
            self.handle.truncate(self.size)
        self.close()
        if self.size <= len(MAGIC):
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        self.handle.close()


def _files(directory: Path) -> list[Path]:
    """In the order they were written."""
    return sorted(path for path in directory.glob(f"*{SUFFIX}") if path.stem.isdecimal())


def _sizes(directory: Path) -> list[tuple[Path, int]]:
    return [(path, max(path.stat().st_size, _LEAST)) for path in _files(directory)]


def _pack(named: list[Adapter], uses: NDArray[np.void]) -> bytes:
    adapters = json.dumps(named, separators=(",", ":")).encode()
    body = adapters + uses.tobytes()
    return _FRAME.pack(zlib.crc32(body), len(adapters), len(uses)) + body


def _frames(content: bytes) -> Iterator[tuple[list[Adapter], NDArray[np.void]]]:
    """(adapters that it names, its uses) of each whole frame; nothing after one that is not whole."""
    at = len(MAGIC)
    if content[:at] != MAGIC:
        return
    while at + _FRAME.size <= len(content):
        checksum, named, count = _FRAME.unpack_from(content, at)
        at += _FRAME.size
        body = content[at : at + named + count * _USE.itemsize]
        at += len(body)
        if len(body) != named + count * _USE.itemsize or zlib.crc32(body) != checksum:
            return
        yield [Adapter(*fields) for fields in json.loads(body[:named])], np.frombuffer(body, _USE, offset=named)


def _without(content: bytes, owner: str) -> tuple[bytes, int]:
    """The whole frames of a file without the uses of `owner`, and how many uses of theirs there were."""
    frames = list(_frames(content))
    gone = np.array([adapter.owner == owner for named, _ in frames for adapter in named], bool)
    numbers = np.cumsum(~gone) - 1  # old number -> new
    kept, erased = [MAGIC], 0
    for named, uses in frames:
        left = uses[~gone[uses["adapter"]]].copy()
        left["adapter"] = numbers[left["adapter"]]
        kept.append(_pack([adapter for adapter in named if adapter.owner != owner], left))
        erased += len(uses) - len(left)
    return b"".join(kept), erased
