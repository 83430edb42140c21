"""What registry, tiers, engine and trace say to each other about a version: plain data, without torch."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Tier(StrEnum):
    DEVICE = "device"
    RAM = "ram"
    DISK = "disk"
    REMOTE = "remote"  # the object store
    BASE = "base"  # no adapter at all


class AdapterRef(NamedTuple):
    """Names a version to the engine, as the registry has it."""

    version: str
    digest: str
    nbytes: int
    owner: str = ""
    pinned: bool = False  # stays on the device, and in RAM, once it is there


class Use(NamedTuple):
    """One request's use of an adapter: where it was found when the request came near, and how long it took to load."""

    time: float  # seconds since the epoch, at the first token
    version: str
    digest: str
    owner: str
    nbytes: int
    tier: Tier
    load_ms: float
