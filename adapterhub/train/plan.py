"""Hyperparameters: what a job asks for, what "auto" becomes, and how long the training then is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

from adapterhub.errors import BadRequest
from adapterhub.swap.block import BlockMeta
from adapterhub.swap.layout import Layout
from adapterhub.train.dataset import Kind

MAX_RANK = 64
VALID_ITEMS = 256  # of held-out data, for each evaluation; chosen by the seed
PROOF_ITEMS = 32  # of the training data, where nothing was held out
_AUTO_STEPS = 60  # small data sets are repeated until they make about that many optimizer steps
_LEARNING_RATES = {Kind.SUPERVISED: 2e-3, Kind.DPO: 2e-4}  # for a base of the width
_WIDTH = 576  # and for narrower ones; a wider one's falls in inverse proportion, as suits Adam (arXiv 2203.03466)
_CHECKPOINTS = 8  # at most so many are taken on the way
_PATIENCE = 3  # checkpoints without a better one, where there is held-out data to tell


class Schedule(StrEnum):
    """How the learning rate goes on after the warmup."""

    LINEAR = "linear"  # down to a tenth
    COSINE = "cosine"  # down to a tenth
    CONSTANT = "constant"


@dataclass(frozen=True)
class _Number:
    """A hyperparameter that is a number in a range; those of one method alone say which."""

    low: float
    high: float
    whole: bool = False
    only: Kind | None = None


_NUMBERS = {
    "n_epochs": _Number(1, 100, whole=True),
    "batch_size": _Number(1, 256, whole=True),
    "learning_rate": _Number(1e-8, 1),
    "learning_rate_multiplier": _Number(1e-4, 100),
    "rank": _Number(1, MAX_RANK, whole=True),
    "alpha": _Number(1e-3, 1024),
    "lora_plus_ratio": _Number(1, 64),
    "weight_decay": _Number(0, 1),
    "max_steps": _Number(1, 1_000_000, whole=True),
    "early_stopping": _Number(0, 100, whole=True),
    "keep_checkpoints": _Number(0, 100, whole=True),
    "held_out": _Number(0, 0.5),
    "beta": _Number(1e-3, 10, only=Kind.DPO),
}


@dataclass(frozen=True)
class Plan:
    """Everything a training run depends on, besides the base, the data, and the adapter it goes on from."""

    kind: Kind
    n_epochs: int
    batch_size: int
    learning_rate: float  # of A, and of B times `lora_plus_ratio`; at its peak
    learning_rate_multiplier: float
    schedule: Schedule
    rank: int
    alpha: float
    rslora: bool  # the scale is alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732)
    lora_plus_ratio: float  # B's learning rate over A's (LoRA+, arXiv 2402.12354)
    targets: tuple[str, ...]  # suffixes of linears' names, such as "q_proj"; empty for all
    weight_decay: float
    seed: int
    max_steps: int | None
    early_stopping: int  # so many checkpoints without a better one end the run; 0 for never
    keep_checkpoints: int  # the newest so many
    held_out: float | None  # share of the training data that is kept for validation; None for what suits its size
    beta: float | None = None  # DPO's

    @property
    def scale(self) -> float:
        """What LoRA's delta is multiplied by. By default a power of two, so that folding it into B loses nothing."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def steps(self, items: int) -> int:
        """Optimizer steps over a data set of so many items."""
        whole = self.steps_per_epoch(items) * self.n_epochs
        return min(whole, self.max_steps or whole)

    def steps_per_epoch(self, items: int) -> int:
        return math.ceil(items / self.batch_size)

    def learning_rate_at(self, step: int, steps: int) -> float:
        """Of the step that comes after `step` ones; a tenth of all is warmup, in a line from near 0."""
        peak = self.learning_rate * self.learning_rate_multiplier
        warm = max(1, round(steps / 10))
        if step < warm:
            return peak * (step + 1) / warm
        done = (step - warm) / max(1, steps - warm)
        match self.schedule:
            case Schedule.LINEAR:
                return peak * (1 - 0.9 * done)
            case Schedule.COSINE:
                return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))
            case Schedule.CONSTANT:
                return peak

    def checkpoint_steps(self, items: int) -> list[int]:
        """After which steps a checkpoint is taken, in order: at the ends of epochs, or in quarters of a single one. The
        last step is none of them: what comes of it is published."""
        steps, epoch = self.steps(items), self.steps_per_epoch(items)
        if steps <= epoch:
            return sorted({steps * quarter // 4 for quarter in (1, 2, 3)} - {0, steps})
        every = epoch * math.ceil(steps / epoch / _CHECKPOINTS)
        return list(range(every, steps, every))

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """As the job object shows them; what is shown can be asked for again."""
        shown = asdict(self)
        for name in ("kind", "seed"):
            del shown[name]
        if self.kind is not Kind.DPO:
            del shown["beta"]
        return {**shown, "targets": list(self.targets) or "all"}


_KNOWN = [f.name for f in fields(Plan) if f.name not in ("kind", "seed")]


def check_hyperparameters(
    given: Mapping[str, Any], base: Layout, kind: Kind = Kind.SUPERVISED, initial: BlockMeta | None = None
) -> None:
    """Raises BadRequest for a value that is out of its limits or of the wrong type, for an unknown name, and for what
    the adapter that the job goes on from, `initial`, has settled otherwise."""
    for name, value in given.items():
        where = f"hyperparameters.{name[:80]}"
        if name not in _KNOWN:
            raise BadRequest(f"{where} is not known. Known are {', '.join(_KNOWN)}.", param=where)
        if value is None or value == "auto":
            continue
        if (number := _NUMBERS.get(name)) is not None:
            _check_number(where, value, number, kind)
        elif name == "targets":
            _targets(value, base)
        elif name == "rslora" and not isinstance(value, bool):
            raise BadRequest(f'{where} is {str(value)[:80]}; it must be "auto", true or false.', param=where)
        elif name == "schedule" and value not in list(Schedule):
            known = ", ".join(Schedule)
            raise BadRequest(f'{where} is {str(value)[:80]}; it must be "auto" or one of {known}.', param=where)
    if initial is not None:
        _check_against(given, initial, base)


def _check_number(where: str, value: Any, number: _Number, kind: Kind) -> None:
    if number.only not in (None, kind):
        raise BadRequest(f"{where} is for the method {number.only} alone.", param=where)
    fits = isinstance(value, int | float) and not isinstance(value, bool) and number.low <= value <= number.high
    if not fits or (number.whole and value != int(value)):
        what = f"{'a whole number' if number.whole else 'a number'} from {number.low:g} to {number.high:g}"
        raise BadRequest(f'{where} is {str(value)[:80]}; it must be "auto" or {what}.', param=where)


def _check_against(given: Mapping[str, Any], initial: BlockMeta, base: Layout) -> None:
    settled: dict[str, Callable[[Any], bool]] = {
        "rank": lambda rank: rank == initial.rank,
        "alpha": lambda alpha: alpha == _initial_alpha(initial),
        "rslora": lambda rslora: rslora is False,
        "targets": lambda targets: _layout(_targets(targets, base), base) == initial.layout,
    }
    for name, same in settled.items():
        value = given.get(name)
        if value not in (None, "auto") and not same(value):
            raise BadRequest(
                f"hyperparameters.{name} is {str(value)[:80]}, but the adapter that the job goes on from has settled "
                "it. Leave it out, or train from the base.",
                param=f"hyperparameters.{name}",
            )


def make_plan(
    given: Mapping[str, Any],
    seed: int,
    items: int,
    base: Layout,
    kind: Kind = Kind.SUPERVISED,
    *,
    width: int,
    valid_items: int = 0,
    initial: BlockMeta | None = None,
) -> Plan:
    """Fills in what was left to us, from the size of the data, `items` to train on and `valid_items` to measure with,
    and from the base's hidden `width`."""
    chosen = {name: value for name, value in given.items() if value not in (None, "auto")}

    def number(name: str, otherwise: float) -> float:
        return float(chosen.get(name, otherwise))

    batch_size = int(number("batch_size", min(8, max(4, items // 200))))
    per_epoch = math.ceil(items / batch_size)
    most = 12 if kind is Kind.SUPERVISED else 4  # preferences are overdone soon
    rank, rslora = int(number("rank", 16)), bool(chosen.get("rslora", False))
    alpha = number("alpha", 8.0 if rslora else 2.0 * rank)
    targets = _targets(chosen.get("targets"), base)
    if initial is not None:
        rank, rslora, targets = initial.rank, False, _suffixes(initial.layout, base)
        alpha = _initial_alpha(initial)
    return Plan(
        kind=kind,
        n_epochs=int(number("n_epochs", min(most, max(2, round(_AUTO_STEPS / per_epoch))))),
        batch_size=batch_size,
        learning_rate=number("learning_rate", _learning_rate(kind, width)),
        learning_rate_multiplier=number("learning_rate_multiplier", 1.0),
        schedule=Schedule(chosen.get("schedule", Schedule.LINEAR)),
        rank=rank,
        alpha=alpha,
        rslora=rslora,
        lora_plus_ratio=number("lora_plus_ratio", 1.0),
        targets=targets,
        weight_decay=number("weight_decay", 0.0),
        seed=seed,
        max_steps=int(chosen["max_steps"]) if "max_steps" in chosen else None,
        early_stopping=int(number("early_stopping", _PATIENCE if valid_items else 0)),
        keep_checkpoints=int(number("keep_checkpoints", 3)),
        held_out=float(chosen["held_out"]) if "held_out" in chosen else None,
        beta=number("beta", 0.1) if kind is Kind.DPO else None,
    )


def _learning_rate(kind: Kind, width: int) -> float:
    """To two digits."""
    return float(f"{_LEARNING_RATES[kind] * min(1, _WIDTH / width):.2g}")


def initial_scale(initial: BlockMeta) -> float:
    """What to divide B by so that training goes on as it was; 1 where modules differ in it."""
    scales = set(initial.scales)
    return scales.pop() if len(scales) == 1 else 1.0


def _initial_alpha(initial: BlockMeta) -> float:
    """As a plan that goes on from it shows it, without rsLoRA."""
    return initial_scale(initial) * initial.rank


def target_layout(plan: Plan, base: Layout) -> Layout:
    return _layout(plan.targets, base)


def _layout(suffixes: tuple[str, ...], base: Layout) -> Layout:
    if not suffixes:
        return base
    return base.subset(t.name for t in base.targets if _suffix(t.name) in suffixes)


def _suffixes(layout: Layout, base: Layout) -> tuple[str, ...]:
    return () if layout == base else tuple(sorted({_suffix(t.name) for t in layout.targets}))


def _suffix(name: str) -> str:
    return name.rpartition(".")[2]


def _targets(given: Any, base: Layout) -> tuple[str, ...]:
    if given is None or given in ("auto", "all"):
        return ()
    known = sorted({_suffix(t.name) for t in base.targets})
    if not isinstance(given, list) or not given or not all(g in known for g in given):
        raise BadRequest(
            f'hyperparameters.targets is {repr(given)[:80]}; it must be "all" or a list out of {", ".join(known)}.',
            param="hyperparameters.targets",
        )
    return tuple(sorted(set(given)))
