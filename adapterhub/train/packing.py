"""Items of several jobs, laid end to end for one forward of the base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from adapterhub.base.batch import Adapter, Batch, Segment, Span
from adapterhub.base.model import Base
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


def forward(
    base: Base,
    parts: Sequence[tuple[Adapter | None, list[Item]]],
    *,
    record: bool,
    give_way: Callable[[], None] | None = None,
) -> list[Outcome]:
    """One forward over every part's items, each part with its adapter, or the base alone; with `record` so that the
    outcomes' log probabilities have a backward, which adds to the adapters' `gradients`.

    `give_way` is called by every layer on the way, in the backward too."""
    spans: list[Span] = []
    segments: list[Segment] = []
    counts: list[list[int]] = []
    tokens, positions, rows, wanted = [], [], [], []
    at = 0
    for adapter, items in parts:
        start = at
        counts.append([])
        for example in (e for item in items for e in item):
            length = len(example.tokens)
            learned = np.flatnonzero(example.learned[1:])  # the row before a token predicts it
            spans.append(Span(at, length, length))
            tokens.append(example.tokens)
            positions.append(np.arange(length))
            rows.append(at + learned)
            wanted.append(example.tokens[1:][learned])
            counts[-1].append(len(learned))
            at += length
        if adapter is not None:
            segments.append(Segment(start, at, adapter))
    device = base.device
    batch = Batch(
        tokens=_joined(tokens, device),
        positions=_joined(positions, device),
        spans=spans,
        segments=segments,
        give_way=give_way,
        anchor=torch.zeros((), device=device, requires_grad=True) if record else None,
    )
    with torch.set_grad_enabled(record):
        logits = base.logits(batch, _joined(rows, device))
        targets = _joined(wanted, device)
        logits = logits.float()
        logprobs = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        said = logits.detach()
        right = said.gather(1, targets.unsqueeze(1)).squeeze(1) >= said.amax(-1)
        sizes = [sum(c) for c in counts]
        return [Outcome(*o) for o in zip(logprobs.split(sizes), right.split(sizes), counts, strict=True)]


def _joined(parts: list[np.ndarray], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device)
