"""How the command line writes and reads amounts: times, shares, durations."""

from __future__ import annotations

import re
import time

from adapterhub.config import format_bytes
from adapterhub.errors import BadRequest

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def size(nbytes: int | None) -> str:
    """1048576 -> "1.0 MiB"; "" for None, as of an adapter that has no release."""
    return "" if nbytes is None else format_bytes(nbytes)


def ago(when: float | None) -> str:
    """Seconds since the epoch -> "12 s ago"; "never" for None."""
    if when is None:
        return "never"
    return f"{duration(max(0.0, time.time() - when))} ago"


def duration(seconds: float) -> str:
    """5400 -> "1.5 h"."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{round(seconds / size, 1):g} {unit}"
    return f"{seconds:.0f} s"


def parse_duration(text: str) -> float:
    """`"90"`, `"90s"`, `"30m"`, `"1.5h"`, `"7d"` in seconds. Raises BadRequest."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd]?)\s*", text, flags=re.IGNORECASE)
    if match is None:
        raise BadRequest(f"{text!r} is not a duration. Write a number and s, m, h or d, as in 90s or 1.5h.")
    return float(match[1]) * _SECONDS[match[2].lower() or "s"]


def percent(share: float | None) -> str:
    """0.123 -> "12.3%"; "-" for None, where there is nothing to share."""
    return "-" if share is None else f"{share:.1%}"


def milliseconds(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:.1f} ms"
