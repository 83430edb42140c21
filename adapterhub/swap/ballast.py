"""Room on the disk that nobody is given but who deletes: SQLite has to write in order to delete, and on a full disk
nothing could be deleted otherwise, so that it would stay full."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapterhub.config import MIB
from adapterhub.swap.files import FULL, has_room

log = logging.getLogger(__name__)
NBYTES = 8 * MIB  # more than SQLite's log grows to
_LENT = MIB  # to one deletion, before it has freed anything
_PIECE = 64 * 1024
_PAUSE_SECONDS = 60.0  # after the room could not be had, though the disk seemed to have it


class Ballast:
    """A file in the data directory, of bytes that no file system stores in less. Safe to use from any thread."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "ballast"
        self._changing = threading.Lock()
        self._not_before = 0.0  # by `time.monotonic`

    def take(self) -> None:
        """Keeps the room, if it is not kept yet, and the disk has as much besides."""
        with self._changing:
            missing = NBYTES - self._size()
            if missing <= 0 or time.monotonic() < self._not_before:
                return
            if shutil.disk_usage(self._path.parent).free >= missing + NBYTES and not self._grow(NBYTES):
                self._not_before = time.monotonic() + _PAUSE_SECONDS  # a quota or a limit has its say

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Within this block there is some room on a full disk; what is left of that is kept again afterwards."""
        before = self._lend()
        try:
            yield
        finally:
            if before:
                with self._changing:
                    self._grow(before)

    def _lend(self) -> int:
        """How much was kept before some of it was given; 0 when none was."""
        if has_room(self._path.parent, _LENT):
            return 0
        with self._changing:
            before = self._size()
            if before:
                log.warning("the disk is full: of the room that is kept for deleting some is used now")
                os.truncate(self._path, max(0, before - _LENT))
            return before

    def _size(self) -> int:
        return self._path.stat().st_size if self._path.exists() else 0

    def _grow(self, nbytes: int) -> bool:
        """False when the disk is full before the file has so many."""
        try:
            with self._path.open("ab", buffering=0) as file:
                while (missing := nbytes - file.tell()) > 0:
                    file.write(os.urandom(min(missing, _PIECE)))
        except OSError as error:
            if error.errno not in FULL:
                raise
            return False
        return True
