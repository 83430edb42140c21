"""What options may be chosen from, where the server's own words would take long to import."""

from __future__ import annotations

from enum import StrEnum


class Priority(StrEnum):
    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"


class Method(StrEnum):
    SUPERVISED = "supervised"
    DPO = "dpo"
