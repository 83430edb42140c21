"""Files that are whole or absent: written beside their place, synced, then renamed."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from adapterhub.errors import StorageFull

PARTIAL = ".partial"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # what a disk, a quota or a file system's limit says


def write_durably(path: Path, *chunks: bytes | memoryview) -> None:
    """Writes `chunks` as `path`. After it returns the file survives a crash; if it raises, nothing is left behind.

    Raises StorageFull when the disk or a quota is full.
    """
    stream_durably(path, chunks)


def stream_durably(path: Path, chunks: Iterable[bytes | memoryview]) -> int:
    """`write_durably` for an iterable; returns the number of bytes."""
    total = 0
    with becoming(path) as partial, partial.open("xb") as file:
        for chunk in chunks:
            file.write(chunk)
            total += len(chunk)
    return total


@contextmanager
def becoming(path: Path) -> Iterator[Path]:
    """A name to write under, beside `path`. At the end of the block the file is synced and renamed to `path`; if the
    block raises, nothing is left behind.

    Raises StorageFull when the disk or a quota is full.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.rename(path)
        sync_directory(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in FULL:
            raise StorageFull(
                "There is no room on the server's disk. Delete what you no longer need, or ask the operator for more "
                "space; nothing was stored."
            ) from error
        raise


def has_room(directory: Path, nbytes: int, at: int = 0) -> bool:
    """Whether a file there may have `nbytes` from byte `at` on, for all that disk, quotas and limits say."""
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            os.posix_fallocate(file.fileno(), at, nbytes)
    except OSError as error:
        return error.errno not in FULL
    return True


def lock_directory(path: Path) -> int | None:
    """Takes the lock of a data directory, which its server holds while it runs: a descriptor, whose closing gives the
    lock back. None when another process has it."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def remove_partials(directory: Path) -> int:
    """Removes what an interrupted write left in `directory`; returns how many files that were."""
    leftovers = list(directory.glob(f"*{PARTIAL}"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


def remove_unnamed(directory: Path, named: Collection[str]) -> int:
    """Removes the files of `directory` that are not among `named`, as a kill may have left them, half written ones too;
    returns how many that were."""
    unnamed = [path for path in directory.iterdir() if path.name not in named]
    for path in unnamed:
        path.unlink()
    return len(unnamed)


def sync_directory(directory: Path) -> None:
    """Makes renames and removals in `directory` durable."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
