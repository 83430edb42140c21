"""The trace's files: every use of an adapter, in 17 bytes, so that a policy can be judged on what users did.

    file   "ahtrace1", then frames
    frame  crc32 of the body, bytes of the adapters' JSON, number of uses (three little-endian uint32), then the body:
           [[version, digest, owner, bytes], ...] of the adapters that this file has not named yet, as JSON;
           the uses as packed records of 17 bytes: time, number of the adapter in this file, milliseconds to load, tier

A fixed record is what can be written without thought and read a million at a time; what is long (ids, digests) is said
once per file. Each file tells all it needs, so that the oldest can be removed when the whole grows over its bound, and
one owner's uses be taken out of a file without a look at the others. A frame that a kill cut off ends its file: readers
ignore it.
"""

from __future__ import annotations

import json
import logging
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from adapterhub.errors import StorageFull
from adapterhub.swap.files import remove_partials, write_durably
from adapterhub.swap.ref import Tier, Use

log = logging.getLogger(__name__)

SUFFIX = ".trace"
MAGIC = b"ahtrace1"
_LEAST = 4096  # bytes that a file counts for at least: what it takes of a disk
_FRAME = struct.Struct("<III")
_TIERS = (Tier.DEVICE, Tier.RAM, Tier.DISK, Tier.REMOTE)
CODES = {tier: code for code, tier in enumerate(_TIERS)}
USE = np.dtype([("time", "<f8"), ("adapter", "<u4"), ("load_ms", "<f4"), ("tier", "u1")])


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
    parts = [np.empty(0, USE)]
    for path in trace_files(directory):
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
    for path in trace_files(directory):
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


def trace_files(directory: Path) -> list[Path]:
    """In the order they were written."""
    return sorted(path for path in directory.glob(f"*{SUFFIX}") if path.stem.isdecimal())


def trace_sizes(directory: Path) -> list[tuple[Path, int]]:
    return [(path, max(path.stat().st_size, _LEAST)) for path in trace_files(directory)]


def pack(named: list[Adapter], uses: NDArray[np.void]) -> bytes:
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
        body = content[at : at + named + count * USE.itemsize]
        at += len(body)
        if len(body) != named + count * USE.itemsize or zlib.crc32(body) != checksum:
            return
        yield [Adapter(*fields) for fields in json.loads(body[:named])], np.frombuffer(body, USE, offset=named)


def _without(content: bytes, owner: str) -> tuple[bytes, int]:
    """The whole frames of a file without the uses of `owner`, and how many uses of theirs there were."""
    frames = list(_frames(content))
    gone = np.array([adapter.owner == owner for named, _ in frames for adapter in named], bool)
    numbers = np.cumsum(~gone) - 1  # old number -> new
    kept, erased = [MAGIC], 0
    for named, uses in frames:
        left = uses[~gone[uses["adapter"]]].copy()
        left["adapter"] = numbers[left["adapter"]]
        kept.append(pack([adapter for adapter in named if adapter.owner != owner], left))
        erased += len(uses) - len(left)
    return b"".join(kept), erased
