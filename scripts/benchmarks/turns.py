"""Contenders take turns, so that a machine that slows down slows all of them: what is measured, and ratios of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.load import Round

# threads of a contender that has answered go on spinning for a while in case there is more: vLLM's for a second, which
# halves what whoever comes next can do
SETTLE_SECONDS = 2.0
Of = Callable[[Round], float]  # what is read off a round


@dataclass
class Case:
    """One contender doing one thing. `who` is "" for AdapterHub, or a peer; cases of one `what` are compared."""

    who: str
    what: str
    measure: Callable[[], Round]
    detail: str = ""  # what sets it apart from another of AdapterHub's own cases of that `what`
    rounds: list[Round] = field(default_factory=list)

    @property
    def name(self) -> str:
        own = f"{self.what}, {self.detail}" if self.detail else self.what
        return f"{self.who}: {own}" if self.who else own

    def values(self, of: Of) -> list[float]:
        return [of(r) for r in self.rounds]

    def median(self, of: Of) -> float:
        return statistics.median(self.values(of))


def take_turns(cases: Sequence[Case], count: int) -> None:
    """`count` rounds of every case, after one of each to warm up."""
    before = cases[0]
    for turn in range(count + 1):
        for case in cases:
            if (case.who, case.detail) != (before.who, before.detail):
                time.sleep(SETTLE_SECONDS)
            done, before = case.measure(), case
            if turn:
                case.rounds.append(done)


def ratios(case: Case, cases: Sequence[Case], of: Of) -> str:
    """`4.7x vLLM, 6.6x PEFT`: the median of a case of AdapterHub's over those of the peers that did the same."""
    peers = [other for other in cases if other.who and other.what == case.what]
    return ", ".join(f"{case.median(of) / peer.median(of):.2g}x {peer.who}" for peer in peers)
