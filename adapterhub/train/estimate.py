"""How much a job will train, how long that takes, and how large its model will be, told before it starts."""

from __future__ import annotations

from dataclasses import dataclass

from adapterhub.base.share import PieceCosts
from adapterhub.train.dataset import DataSet, Kind
from adapterhub.train.plan import PROOF_ITEMS, VALID_ITEMS, Plan

_FORWARD = 1 / 3  # of what a token costs that is trained: the backward costs as much as two forwards


@dataclass(frozen=True)
class Estimate:
    tokens: int  # that will be trained, each as often as it is
    forward_tokens: int  # that pass forward alone, to measure the loss or as the reference of preferences
    seconds: float | None  # with the device to itself; None where it is not known what training costs
    bytes: int  # of the model that comes of it

    @property
    def message(self) -> str:
        told = f"{self.tokens} tokens to train"
        if self.forward_tokens:
            told += f" and {self.forward_tokens} to measure with"
        if self.seconds is not None:
            told += f", about {_duration(self.seconds)} with the device to itself"
        return told


def estimate(
    train: DataSet, valid: DataSet | None, plan: Plan, costs: PieceCosts | None, nbytes: int, *, going_on: bool = False
) -> Estimate:
    """`costs`: of training on this device; None if they are unknown. `nbytes`: of the model. `going_on`: from an
    adapter, which is measured as well."""
    items, steps = len(train), plan.steps(len(train))
    epochs, rest = divmod(steps, plan.steps_per_epoch(items))
    passes = epochs + rest * plan.batch_size / items
    tokens = round(train.tokens * passes)
    measured = train.tokens * min(1, PROOF_ITEMS / items) if valid is None else _measured(valid)
    times = (
        1 + going_on + (plan.kind is not Kind.DPO)
    )  # at the end and before, but for the base of preferences: it is 0
    if valid is not None:
        times += len(plan.checkpoint_steps(items))
    forward = measured * times
    if plan.kind is Kind.DPO:  # the reference, once for each item
        forward += train.tokens * min(1, passes) + (_measured(valid) if valid is not None else 0)
    seconds = None
    if costs is not None:
        seconds = steps * costs.seconds_of_all(tokens / steps) + _FORWARD * costs.seconds_of_all(forward)
    return Estimate(tokens, round(forward), seconds, nbytes)


def _measured(valid: DataSet) -> float:
    """Tokens of an evaluation."""
    return valid.tokens * min(1, VALID_ITEMS / len(valid))


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(1, round(seconds))} s"
