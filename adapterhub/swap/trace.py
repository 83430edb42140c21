"""The recorder: writes every use of an adapter down, in a bounded number of bytes (`frames.py` says how).

`Recorder.record` only appends to a queue in memory; one thread writes what has gathered, a few times a second, as one
frame at the end of a file. Each start of the server begins a new file. Nothing is synced: a loss of power may take the
last seconds, a `kill -9` at most those that were not written yet.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from adapterhub.config import MIB
from adapterhub.swap.frames import CODES, MAGIC, SUFFIX, USE, Adapter, erase_owner, pack, trace_files, trace_sizes
from adapterhub.swap.ref import Use

log = logging.getLogger(__name__)

MAX_BYTES = 64 * MIB  # of all files together; about 3.5 million uses
MAX_PENDING = 65_536  # uses that wait to be written; one more is dropped
_FILES = 8  # the bound is shared by about that many files: how much goes when the oldest goes
_FRAME_USES = 1024  # at most: little enough to be made between two steps of the engine
_WRITE_SECONDS = 0.25  # how often what has gathered is written
_PAUSE_SECONDS = 10.0  # after a write that failed


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
                "bytes": sum(size for _, size in trace_sizes(self.directory)),
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
        sizes = trace_sizes(self.directory)
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
        last = max((int(path.stem) for path in trace_files(directory)), default=0)
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
            (use.time, self.numbers.setdefault(Adapter(*use[1:5]), len(self.numbers)), use.load_ms, CODES[use.tier])
            for use in uses
        ]
        return pack(list(self.numbers)[known:], np.array(records, USE))

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
