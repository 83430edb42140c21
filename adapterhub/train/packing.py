"""Items of several jobs, laid end to end for one forward of the base, and its backward.

Three backends learn: native code on a CPU with AVX-512 BF16, Triton's kernels on a GPU, and torch elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from adapterhub.base import batch as batches
from adapterhub.base.batch import Adapter, Batch, Segment, Span, send
from adapterhub.base.model import Base
from adapterhub.base.native.learner import Learner, can_learn
from adapterhub.base.pace import Pace
from adapterhub.base.triton import usable
from adapterhub.base.triton.learning import LearningBatches
from adapterhub.train.dataset import Example

Item = tuple[Example, ...]  # one example, or the two of a preference


@dataclass(frozen=True)
class Outcome:
    """What a forward said of some items: for each token to be learned, in order, its log probability [n], and whether
    it was the likeliest [n]; `counts` are the numbers of such tokens of each example."""

    logprobs: torch.Tensor
    right: torch.Tensor
    counts: list[int]

    def sums(self) -> torch.Tensor:
        """[examples] the log probability of what each one says."""
        return torch.stack([part.sum() for part in self.logprobs.split(self.counts)])


class Forward:
    """Forwards of many jobs' items on one base; natively where its family is known, by Triton's kernels on a GPU."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._learner = Learner(base) if can_learn(base) else None
        self._kernels = LearningBatches(base.layout, base.device) if usable(base.device) else None
        self._pace = Pace() if base.device.type == "cuda" else None

    def __call__(
        self,
        parts: Sequence[tuple[Adapter | None, list[Item]]],
        *,
        record: bool,
        give_way: Callable[[], None] | None = None,
    ) -> list[Outcome]:
        """One forward over every part's items, each part with its adapter, or the base alone; with `record` so that the
        outcomes' log probabilities have a backward, see `backward`.

        `give_way` is called by every layer on the way, in the backward too."""
        laid = batches.Forward([], [], [], [], [], [])
        targets: list[int] = []
        counts: list[list[int]] = []
        at = 0
        for adapter, items in parts:
            start = at
            counts.append([])
            for example in (e for item in items for e in item):
                length = len(example.tokens)
                learned = np.flatnonzero(example.learned[1:])  # the row before a token predicts it
                laid.spans.append(Span(at, length, length))
                laid.tokens.extend(example.tokens.tolist())
                laid.positions.extend(range(length))
                laid.wanted.extend((at + learned).tolist())
                targets.extend(example.tokens[1:][learned].tolist())
                counts[-1].append(len(learned))
                at += length
            if adapter is not None:
                laid.segments.append(Segment(start, at, adapter))
        batch = self._batch(laid, record, self._paced(give_way))
        predicting = batch.tables.wanted if batch.tables else self._sent(laid.wanted)
        with torch.set_grad_enabled(record):
            logprobs, right = self._logprobs(batch, predicting, self._sent(targets))
            sizes = [sum(c) for c in counts]
            return [Outcome(*o) for o in zip(logprobs.split(sizes), right.split(sizes), counts, strict=True)]

    def backward(self, loss: torch.Tensor) -> None:
        """Of a loss that is made of the last forward's outcomes, before the next forward: adds to the adapters'
        `gradients`, and is done when this returns."""
        with torch.autograd.set_multithreading_enabled(False):  # or a GPU's would have a thread of torch's own
            loss.backward()
        if self._pace is not None:
            self._pace.finish()

    def release(self) -> None:
        """Gives back what is kept from one forward to the next."""
        if self._learner is not None:
            self._learner.release()

    def _paced(self, give_way: Callable[[], None] | None) -> Callable[[], None] | None:
        pace = self._pace
        if pace is None or give_way is None:
            return give_way

        def paced() -> None:
            pace.step()
            give_way()

        return paced

    def _batch(self, forward: batches.Forward, record: bool, give_way: Callable[[], None] | None) -> Batch:
        """`forward` on the device."""
        if self._kernels is not None:
            return self._kernels.batch(forward, record=record, give_way=give_way)
        return Batch(
            self._sent(forward.tokens),
            self._sent(forward.positions),
            forward.spans,
            forward.segments,
            give_way=give_way,
            anchor=torch.zeros((), device=self._base.device, requires_grad=True) if record else None,
        )

    def _sent(self, numbers: list[int]) -> torch.Tensor:
        return send(torch.tensor(numbers, dtype=torch.long), self._base.device)

    def _logprobs(self, batch: Batch, rows: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each target after its row: its log probability [n], and whether it was the likeliest [n]."""
        if self._learner is not None:
            return self._learner.logprobs(batch, rows, targets)
        logits = self._base.logits(batch, rows).float()
        logprobs = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        said = logits.detach()
        return logprobs, said.gather(1, targets.unsqueeze(1)).squeeze(1) >= said.amax(-1)
