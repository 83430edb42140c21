"""Files that are whole or absent: written beside their place, synced, then renamed."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from adapterhub.errors import StorageFull

PARTIAL = ".partial"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_durably(path: Path, *chunks: bytes | memoryview) -> None:
    """Writes `chunks` as `path`. After it returns the file survives a crash; if it raises, nothing is left behind.

    Raises StorageFull when the disk or a quota is full.
    """
    stream_durably(path, chunks)


def stream_durably(path: Path, chunks: Iterable[bytes | memoryview]) -> int:
    """`write_durably` for an iterable; returns the number of bytes."""
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    total = 0
    try:
        with partial.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
                total += len(chunk)
            _sync(file)
        partial.rename(path)
        sync_directory(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise StorageFull(
                f"There is no room on the server's disk for another {total} bytes. Delete what you no longer need, or "
                "ask the operator for more space; nothing was stored."
            ) from error
        raise
    return total


def remove_partials(directory: Path) -> int:
    """Removes what an interrupted write left in `directory`; returns how many files that were."""
    leftovers = list(directory.glob(f"*{PARTIAL}"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


def sync_directory(directory: Path) -> None:
    """Makes renames and removals in `directory` durable."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
