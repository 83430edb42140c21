"""A figure as every measuring script reports it: a median with its spread, and what stands beside it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """Median, minimum and maximum of `runs` measurements; `note` is what stands beside it: a limit, a ratio, a goal."""

    name: str
    unit: str
    median: float
    low: float
    high: float
    runs: int
    note: str = ""

    @classmethod
    def of(cls, name: str, unit: str, values: Sequence[float], note: str = "") -> Figure:
        numbers = (statistics.median(values), min(values), max(values))
        return cls(name, unit, *(float(f"{n:.4g}") for n in numbers), len(values), note)

    def __str__(self) -> str:
        spread = f"{self.median:>10g}  ({self.low:g} to {self.high:g}, {self.runs} runs)"
        return f"{self.name:<58} {spread:<44} {self.unit:<8} {self.note}".rstrip()
