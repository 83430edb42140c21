"""One job's training, as a sequence of works for the base and what is done between them.

A run computes nothing on the base itself: it asks for work (`work.py`), which the co-trainer carries out together with
that of other runs, and goes on when that is done. Its course depends on its own plan and data alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch

from adapterhub.base.model import Base
from adapterhub.errors import ServerFault
from adapterhub.swap import peft
from adapterhub.swap.block import Block, BlockMeta
from adapterhub.train.dataset import DataSet, Kind
from adapterhub.train.news import Checkpoint, Evaluation, News, Progress, Proof, Saved, Started, Trained
from adapterhub.train.parameters import Parameters
from adapterhub.train.plan import PROOF_ITEMS, VALID_ITEMS, Plan, initial_scale, target_layout
from adapterhub.train.state import CopyRoom, RunState
from adapterhub.train.work import PreferenceWork, References, ReferenceWork, Work

_MAX_NORM = 1.0
_SAVE_SECONDS = 30.0
_SMOOTH = 5  # losses, whose mean tells a rise from a hard batch
_RISE = 1.0  # nats


@dataclass
class _Facts:
    """What a run knows besides its tensors."""

    step: int = 0
    reported: int = 0  # the step whose progress was told last
    kept: int = 0  # the step whose checkpoint was told last
    trained_tokens: int = 0
    loss: float = 0.0  # of the last step, as are the next three
    accuracy: float = 0.0
    rate: float = 0.0
    norm: float = 0.0
    latest: list[float] = field(default_factory=list)  # losses, since a rise was suspected last
    base: dict[str, float] | None = None  # the base's Evaluation
    start: dict[str, float] | None = None  # that of what the training begins with: the base, or an adapter
    valid: dict[str, float] | None = None  # the latest Evaluation
    best: dict[str, float] | None = None  # the best one on the way, with early stopping
    best_step: int = 0
    worse: int = 0  # evaluations since then
    stopped: bool = False


class Run:
    """Made on any thread; `works` and `snapshot` are the engine's. `tell` must not block."""

    def __init__(
        self,
        base: Base,
        plan: Plan,
        train: DataSet,
        valid: DataSet | None,
        tell: Callable[[News], None],
        *,
        initial: Block | None = None,
        state: RunState | None = None,
        copies: CopyRoom | None = None,
    ) -> None:
        """`initial` is the adapter to go on from; `state` what a snapshot of this very run has saved; `copies` the room
        for its snapshots, which all runs share, or None for no limit."""
        self.plan, self.tell = plan, tell
        self._base, self._train, self._valid, self._initial = base, train, valid, initial
        self._steps = plan.steps(len(train))
        self._checkpoints = set(plan.checkpoint_steps(len(train)))
        layout = initial.meta.layout if initial else target_layout(plan, base.layout)
        scale = initial_scale(initial.meta) if initial else plan.scale
        self._parameters = Parameters(layout, plan.rank, scale, base.dtype, base.device)
        groups = [{"params": [half]} for half in self._parameters.halves]
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=plan.weight_decay, fused=True)
        self._copies, self._owes_state = copies, False
        self._references: dict[DataSet, References] = {}
        self._epoch, self._order = -1, np.empty(0, np.int64)  # of the items, in that epoch
        self._measured = self._choose_measured()
        self._facts = _Facts()
        self._best: torch.Tensor | None = None  # the payload of the best evaluation
        if state is not None:
            self._restore(state)
        elif initial is not None:
            self._parameters.start_from(initial)
        else:
            self._parameters.start_fresh(plan.seed)
        self._take_memory()
        self._began = self._saved = time.monotonic()
        self._began_at, self._began_tokens = self._facts.step, self._facts.trained_tokens

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return self._facts.step

    def works(self) -> Iterator[Work]:
        """What is to be done on the base, one after the other; each must be done before the next is asked for.

        Raises ServerFault when the training has diverged.
        """
        facts = self._facts
        self._began = self._saved = time.monotonic()
        self.tell(Started(facts.step, self._steps))
        if facts.base is None:
            facts.base = asdict((yield from self._evaluate(None)))
        if facts.start is None:
            facts.start = asdict((yield from self._evaluate(self._parameters))) if self._initial else facts.base
        while True:
            if facts.reported < facts.step:
                yield from self._report()
            if facts.stopped or facts.step == self._steps:
                break
            yield from self._learn()
        yield from self._finish()

    def snapshot(self) -> RunState:
        """As of the last optimizer step; what was learned of the next one is left out, and will be learned again."""
        tensors = {"block": self._parameters.block.cpu().clone()}
        for name, half in zip("ab", self._parameters.halves, strict=True):
            for key, value in self._optimizer.state[half].items():
                tensors[f"{name}.{key}"] = value.cpu().clone()
        if self._best is not None:
            tensors["best"] = self._best
        return RunState(self._facts.step, tensors, asdict(self._facts))

    def _take_memory(self) -> None:
        """Of the optimizer, as it would itself at its first step: a device that has too little for a run says so before
        the run begins."""
        for half in self._parameters.halves:
            if not self._optimizer.state[half]:
                moments = {name: torch.zeros_like(half) for name in ("exp_avg", "exp_avg_sq")}
                self._optimizer.state[half] = {"step": torch.zeros((), device=half.device), **moments}

    def _restore(self, state: RunState) -> None:
        device = self._parameters.block.device
        try:
            self._facts = _Facts(**state.facts)
            self._parameters.block.copy_(state.tensors["block"])
            for name, half in zip("ab", self._parameters.halves, strict=True):
                found = {k[2:]: t.to(device) for k, t in state.tensors.items() if k.startswith(f"{name}.")}
                if found:
                    self._optimizer.state[half] = found
        except (LookupError, TypeError, RuntimeError) as error:
            raise ServerFault(
                f"The saved state of the training does not fit it ({error}).", code="training_state_damaged"
            ) from error
        self._best = state.tensors.get("best")
        self._parameters.refresh()

    # -- learning

    def _learn(self) -> Iterator[Work]:
        """One optimizer step. The loss of its batch is the first of what the last step has made, and shows that to work
        before it is kept."""
        facts, plan, parameters = self._facts, self.plan, self._parameters
        work = yield from self._done(self._train, self._batch(facts.step), parameters, learn=True)
        found, norm = work.result, parameters.finish_gradient(_MAX_NORM, work.whole)
        self._check_finite(found.loss, norm)
        latest = yield from self._check_rise([*facts.latest, found.loss][-_SMOOTH:])
        self._keep()
        facts.loss, facts.accuracy, facts.norm, facts.latest = found.loss, found.accuracy, norm, latest
        facts.rate = plan.learning_rate_at(facts.step, self._steps)
        for group, ratio in zip(self._optimizer.param_groups, (1.0, plan.lora_plus_ratio), strict=True):
            group["lr"] = facts.rate * ratio
        self._optimizer.step()
        parameters.refresh()
        facts.step += 1
        facts.trained_tokens += work.tokens

    def _batch(self, step: int) -> list[int]:
        """Every item once an epoch, in an order that the seed decides."""
        epoch, at = divmod(step, self.plan.steps_per_epoch(len(self._train)))
        if epoch != self._epoch:
            order = np.random.default_rng((self.plan.seed, epoch)).permutation(len(self._train))
            self._epoch, self._order = epoch, order
        size = self.plan.batch_size
        return self._order[at * size : (at + 1) * size].tolist()

    def _keep(self) -> None:
        """The adapter as it is since the last step, where a checkpoint is due; with it, and now and then, the state, as
        soon as there is room for a copy."""
        facts = self._facts
        if facts.step in self._checkpoints and facts.kept < facts.step:
            facts.kept, self._owes_state = facts.step, True
            if self.plan.keep_checkpoints:
                self.tell(Checkpoint(facts.step, self._block(self._parameters.folded()), self._metrics()))
        if self._owes_state or time.monotonic() - self._saved >= _SAVE_SECONDS:
            self._save()

    def _save(self) -> None:
        if self._copies is not None and not self._copies.admits(3 * self._parameters.block.nbytes):
            return  # others' states are being written: after the next step, then
        state = self.snapshot()
        if self._copies is not None:
            self._copies.take(state)
        self.tell(Saved(state))
        self._saved, self._owes_state = time.monotonic(), False

    # -- diverging

    def _check_finite(self, *numbers: float) -> None:
        if not all(map(math.isfinite, numbers)):
            raise self._diverged(f"The loss is not finite after step {self._facts.step}")

    def _check_rise(self, latest: list[float]) -> Generator[Work, None, list[float]]:
        """Raises ServerFault when the losses of the latest batches have risen far above what the training began with:
        by a nat, and where that is an adapter, more than half of the way back to the base. They may just be hard
        batches, so it is on their very items that all three are measured then. Returns the losses to go on with."""
        facts = self._facts
        assert facts.base is not None
        assert facts.start is not None
        expected = min(facts.start["loss"], facts.base["loss"])
        if len(latest) < _SMOOTH or float(np.mean(latest)) <= expected + _RISE:
            return latest
        steps = range(facts.step + 1 - _SMOOTH, facts.step + 1)
        items = sorted({item for step in steps for item in self._batch(step)})
        now = (yield from self._measure(self._parameters, self._train, items)).loss
        base = start = (yield from self._measure(None, self._train, items)).loss
        if self._initial is not None:
            start = (yield from self._measure(self._beginning(self._initial), self._train, items)).loss
        if not now <= max(start + _RISE, (start + base) / 2):
            raise self._diverged(f"The loss rose from {start:.2f} to {now:.2f} by step {facts.step}")
        return []

    def _beginning(self, initial: Block) -> Parameters:
        """What the training has begun with."""
        own = self._parameters
        parameters = Parameters(own.layout, own.rank, own.scale, self._base.dtype, self._base.device)
        parameters.start_from(initial)
        return parameters

    def _diverged(self, what: str) -> ServerFault:
        advice = f"Lower learning_rate_multiplier (it was {self.plan.learning_rate_multiplier:g})."
        return ServerFault(f"{what}: the training diverged. {advice}", code="training_diverged")

    # -- measuring and telling

    def _report(self) -> Iterator[Work]:
        """After an optimizer step: its progress, and now and then an evaluation."""
        facts = self._facts
        valid = None
        due = facts.step in self._checkpoints
        if self._valid is not None and (due or facts.step == self._steps):
            valid = yield from self._evaluate(self._parameters)
            facts.valid = asdict(valid)
            if due and self.plan.early_stopping:
                self._compare(valid)
        facts.reported = facts.step
        self.tell(self._progress(valid))

    def _compare(self, found: Evaluation) -> None:
        """Is it the best so far, and if not, is it time to stop?"""
        facts = self._facts
        if facts.best is None or found.loss < facts.best["loss"]:
            facts.best, facts.best_step, facts.worse = asdict(found), facts.step, 0
            self._best = self._parameters.folded()
        else:
            facts.worse += 1
            facts.stopped = facts.worse >= self.plan.early_stopping

    def _progress(self, valid: Evaluation | None) -> Progress:
        facts = self._facts
        seconds, done = time.monotonic() - self._began, facts.step - self._began_at
        return Progress(
            step=facts.step,
            total_steps=self._steps,
            loss=facts.loss,
            accuracy=facts.accuracy,
            learning_rate=facts.rate,
            gradient_norm=facts.norm,
            trained_tokens=facts.trained_tokens,
            tokens_per_second=(facts.trained_tokens - self._began_tokens) / seconds,
            seconds_left=seconds / max(1, done) * (self._steps - facts.step),
            valid=valid,
        )

    def _metrics(self) -> dict[str, float]:
        """Of the last step, after which a checkpoint is due."""
        facts = self._facts
        found: dict[str, float] = {
            "step": facts.step,
            "train_loss": facts.loss,
            "train_mean_token_accuracy": facts.accuracy,
        }
        if facts.valid is not None:
            found |= {
                "full_valid_loss": facts.valid["loss"],
                "full_valid_mean_token_accuracy": facts.valid["accuracy"],
            }
        return found

    def _choose_measured(self) -> list[int]:
        """The items of every evaluation."""
        data, most = (self._train, PROOF_ITEMS) if self._valid is None else (self._valid, VALID_ITEMS)
        return np.random.default_rng(self.plan.seed).permutation(len(data))[:most].tolist()

    def _evaluate(self, adapter: Parameters | None) -> Generator[Work, None, Evaluation]:
        """The adapter, or the base alone, on held-out data; where there is none, on some of the training data. Raises
        ServerFault when that has no finite loss."""
        found = yield from self._measure(adapter, self._valid or self._train, self._measured)
        self._check_finite(found.loss)
        return found

    def _measure(
        self, adapter: Parameters | None, data: DataSet, items: list[int]
    ) -> Generator[Work, None, Evaluation]:
        if adapter is None and self.plan.kind is Kind.DPO:
            return Evaluation(math.log(2), 0.0)  # the base gains nothing over itself: every margin is 0
        work = yield from self._done(data, items, adapter)
        return work.result

    def _finish(self) -> Iterator[Work]:
        facts = self._facts
        payload, step = self._parameters.folded(), facts.step
        found = Evaluation(**facts.valid) if facts.valid else (yield from self._evaluate(self._parameters))
        if facts.best is not None and not found.loss <= facts.best["loss"]:
            assert self._best is not None
            payload, step, found = self._best, facts.best_step, Evaluation(**facts.best)
        block = self._block(payload)
        assert facts.base is not None
        proof = Proof(
            finite=bool(payload.isfinite().all()),
            has_effect=len(list(peft.no_effect(block))) < len(block.meta.layout.targets),
            trained=found,
            base=Evaluation(**facts.base),
            initial=Evaluation(**facts.start) if self._initial and facts.start else None,
            held_out=self._valid is not None,
        )
        self.tell(Trained(block, step, facts.trained_tokens, proof, facts.stopped))

    # -- works

    def _done(
        self, data: DataSet, items: list[int], adapter: Parameters | None, *, learn: bool = False
    ) -> Generator[Work, None, Work]:
        """Has items worked on; returns the work. Of preferences, the base's view comes first, once for each item."""
        work: Work
        if self.plan.beta is None or adapter is None:
            work = Work(data, items, adapter, learn=learn)
        else:
            references = self._references.setdefault(data, References(data))
            if missing := references.missing(items):
                yield ReferenceWork(references, missing)
            work = PreferenceWork(references, items, adapter, self.plan.beta, learn=learn)
        yield work
        return work

    def _block(self, payload: torch.Tensor) -> Block:
        if self._initial is not None:
            return Block(replace(self._initial.meta, dtype=self._base.dtype), payload)
        base, plan, layout = self._base, self.plan, self._parameters.layout
        count = len(layout.targets)
        meta = BlockMeta(
            fingerprint=base.fingerprint,
            rank=plan.rank,
            layout=layout,
            ranks=(plan.rank,) * count,
            scales=(plan.scale,) * count,
            config={
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": base.name,
                "r": plan.rank,
                "lora_alpha": plan.alpha,
                "use_rslora": plan.rslora,
                "lora_dropout": 0.0,
                "bias": "none",
                "target_modules": sorted({t.name.rpartition(".")[2] for t in layout.targets}),
                "inference_mode": True,
            },
            dtype=base.dtype,
        )
        return Block(meta, payload)
