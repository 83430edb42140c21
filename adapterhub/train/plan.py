"""Hyperparameters: what a job asks for, what "auto" becomes, and how long the training then is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from adapterhub.errors import BadRequest
from adapterhub.swap.layout import Layout

MAX_RANK = 64
_LEARNING_RATE = 2e-3  # times learning_rate_multiplier
_AUTO_STEPS = 60  # small data sets are repeated until they make about that many optimizer steps
_LIMITS: dict[str, tuple[type, float, float]] = {
    "n_epochs": (int, 1, 100),
    "batch_size": (int, 1, 256),
    "learning_rate_multiplier": (float, 1e-4, 100),
    "rank": (int, 1, MAX_RANK),
    "max_steps": (int, 1, 1_000_000),
}


@dataclass(frozen=True)
class Plan:
    """Everything a training run depends on, besides the base and the data."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float
    rank: int
    targets: tuple[str, ...]  # suffixes of linears' names, such as "q_proj"; empty for all
    seed: int
    max_steps: int | None

    @property
    def learning_rate(self) -> float:
        return _LEARNING_RATE * self.learning_rate_multiplier

    @property
    def scale(self) -> float:
        """LoRA's alpha / r, with alpha = 2 r: a power of two, so that folding it into B loses nothing."""
        return 2.0

    def steps(self, examples: int) -> int:
        whole = math.ceil(examples / self.batch_size) * self.n_epochs
        return min(whole, self.max_steps or whole)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """As the job object shows them."""
        fields = asdict(self)
        del fields["seed"]
        return {**fields, "targets": list(self.targets) or "all"}


def check_hyperparameters(given: Mapping[str, Any], base: Layout) -> None:
    """Raises BadRequest for a value that is out of its limits or of the wrong type. Unknown names are refused too."""
    for name, value in given.items():
        where = f"hyperparameters.{name[:80]}"
        if name == "targets":
            _targets(value, base)
            continue
        if name not in _LIMITS:
            raise BadRequest(f"{where} is not known. Known are {', '.join([*_LIMITS, 'targets'])}.", param=where)
        kind, low, high = _LIMITS[name]
        if value is None or value == "auto":
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value <= high or (kind is int and value != int(value)):
            what = f"{'a whole number' if kind is int else 'a number'} from {low:g} to {high:g}"
            raise BadRequest(f'{where} is {str(value)[:80]}; it must be "auto" or {what}.', param=where)


def make_plan(given: Mapping[str, Any], seed: int, examples: int, base: Layout) -> Plan:
    """Fills in what was left to us, from the size of the data."""
    chosen = {name: value for name, value in given.items() if value not in (None, "auto")}
    batch_size = int(chosen.get("batch_size", min(8, max(4, examples // 200))))
    per_epoch = math.ceil(examples / batch_size)
    return Plan(
        n_epochs=int(chosen.get("n_epochs", min(12, max(2, round(_AUTO_STEPS / per_epoch))))),
        batch_size=batch_size,
        learning_rate_multiplier=float(chosen.get("learning_rate_multiplier", 1.0)),
        rank=int(chosen.get("rank", 16)),
        targets=_targets(chosen.get("targets"), base),
        seed=seed,
        max_steps=int(chosen["max_steps"]) if "max_steps" in chosen else None,
    )


def target_layout(plan: Plan, base: Layout) -> Layout:
    if not plan.targets:
        return base
    return base.subset(t.name for t in base.targets if t.name.rpartition(".")[2] in plan.targets)


def _targets(given: Any, base: Layout) -> tuple[str, ...]:
    if given is None or given in ("auto", "all"):
        return ()
    known = sorted({t.name.rpartition(".")[2] for t in base.targets})
    if not isinstance(given, list) or not given or not all(g in known for g in given):
        raise BadRequest(
            f'hyperparameters.targets is {given!r}; it must be "all" or a list out of {", ".join(known)}.',
            param="hyperparameters.targets",
        )
    return tuple(sorted(set(given)))
