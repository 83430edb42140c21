"""What a training run tells of itself, in the order it happens; plain data, told on the engine's thread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from adapterhub.errors import HubError
from adapterhub.swap.block import Block


@dataclass(frozen=True)
class Evaluation:
    """Means over the learned tokens of held-out data, or over the pairs of a preference data set."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Started:
    """The first micro-step is next. `step` is where the run goes on, 0 at a first start."""

    step: int
    total_steps: int


@dataclass(frozen=True)
class Progress:
    """After an optimizer step. Loss and accuracy are means over the learned tokens of its batch; of preference pairs
    the accuracy is the share in which the preferred answer gained more. `valid` is there after an evaluation."""

    step: int
    total_steps: int
    loss: float
    accuracy: float
    learning_rate: float
    gradient_norm: float  # before clipping
    trained_tokens: int
    tokens_per_second: float  # by the clock, since the run began or went on
    seconds_left: float
    valid: Evaluation | None = None


class Snapshot(Protocol):
    """All that a run needs to go on as if nothing had happened: a copy, which another thread may save."""

    @property
    def step(self) -> int: ...

    def save(self, path: Path) -> None:
        """Written beside `path`, synced and renamed. Raises StorageFull."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """The adapter as it is after `step`, with what has been measured of it; told before the next step's `Progress`, as
    soon as the next batch has shown it to work."""

    step: int
    block: Block
    metrics: Mapping[str, float]  # by OpenAI's names: step, train_loss, full_valid_loss, ..


@dataclass(frozen=True)
class Saved:
    """A snapshot: every half minute, after each checkpoint, and last of all when the run is taken out (`last`)."""

    snapshot: Snapshot
    last: bool = False


@dataclass(frozen=True)
class Proof:
    """What was checked of a trained adapter before anybody is served with it."""

    finite: bool
    has_effect: bool
    trained: Evaluation | None  # None where it was not finite
    base: Evaluation | None  # the base alone, on the same data
    initial: Evaluation | None  # likewise the adapter that the training went on from; None from the base
    held_out: bool  # measured on data that it was not trained on

    @property
    def usable(self) -> bool:
        return self.finite and self.has_effect

    @property
    def beats_base(self) -> bool:
        """Of preference pairs: more of them are told apart than by the base, which prefers neither."""
        return self.trained is not None and self.base is not None and self.trained.loss < self.base.loss

    @property
    def no_worse(self) -> bool:
        """Than what it went on from."""
        return self.trained is not None and (self.initial is None or self.trained.loss <= self.initial.loss)


@dataclass(frozen=True)
class Trained:
    """The end. `step` is that of the block, an earlier one than the last where early stopping chose it."""

    block: Block
    step: int
    trained_tokens: int
    proof: Proof
    stopped_early: bool


@dataclass(frozen=True)
class TakenOut:
    """The run was taken out without a snapshot; nothing more is told, and its memory is free."""


@dataclass(frozen=True)
class Lost:
    """The device is lost, and with it all that was not saved; nothing more is told. For any thread to tell."""


News = Started | Progress | Checkpoint | Saved | Trained | TakenOut | Lost | HubError
