"""How much a job will train and how long that takes, told before it starts."""

from __future__ import annotations

from dataclasses import dataclass

from adapterhub.train.dataset import DataSet, Kind
from adapterhub.train.plan import Plan

_FORWARD = 1 / 3  # of what a token costs that is trained: the backward costs as much as two forwards


@dataclass(frozen=True)
class Estimate:
    tokens: int  # that will be trained, each as often as it is
    forward_tokens: int  # that pass forward alone, to measure the loss or as the reference of preferences
    seconds: float | None  # with the device to itself; None where no rate is known

    @property
    def message(self) -> str:
        told = f"{self.tokens} tokens to train"
        if self.forward_tokens:
            told += f" and {self.forward_tokens} to measure with"
        if self.seconds is not None:
            told += f", about {_duration(self.seconds)} with the device to itself"
        return told


def estimate(train: DataSet, valid: DataSet | None, plan: Plan, rate: float | None) -> Estimate:
    """`rate`: tokens trained per second, as measured on this device; None if it is unknown."""
    items = len(train)
    epochs, rest = divmod(plan.steps(items), plan.steps_per_epoch(items))
    passes = epochs + rest * plan.batch_size / items
    tokens = round(train.tokens * passes)
    forward = 0
    if valid is not None:
        # at the checkpoints, at the end, and of the base alone, to which preferences need no comparison
        forward += valid.tokens * (len(plan.checkpoint_steps(items)) + (1 if plan.kind is Kind.DPO else 2))
    if plan.kind is Kind.DPO:
        forward += round(train.tokens * min(1, passes)) + (valid.tokens if valid is not None else 0)
    return Estimate(tokens, forward, None if rate is None else (tokens + _FORWARD * forward) / rate)


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(1, round(seconds))} s"
