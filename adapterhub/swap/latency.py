"""How long the last loads took."""

from __future__ import annotations

from collections import deque

_KEPT = 1000


class Latencies:
    """Of the last 1000 loads. One thread may add while another asks."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=_KEPT)
        self.count = 0  # since the start

    def add(self, milliseconds: float) -> None:
        self._last.append(milliseconds)
        self.count += 1

    def summary(self) -> dict[str, float] | None:
        """Percentiles (nearest rank) and mean, in milliseconds; None before the first."""
        ordered = sorted(self._last.copy())
        if not ordered:
            return None

        def percentile(share: float) -> float:
            return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

        return {"p50": percentile(0.5), "p99": percentile(0.99), "mean": sum(ordered) / len(ordered)}
