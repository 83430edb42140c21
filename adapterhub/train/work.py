"""What a run wants of the base next: items to learn from, or to be measured on, in an order that does not matter.

The co-trainer takes from it as many items as there is room for, of several runs at once, until none is left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from adapterhub.train.dataset import DataSet
from adapterhub.train.news import Evaluation
from adapterhub.train.packing import Item, Outcome
from adapterhub.train.parameters import Parameters


class Work:
    """Items of one data set for one adapter, or for the base alone; to `learn` from them, or to be measured on them.

    A loss is the mean over learned tokens of all items of the work.
    """

    def __init__(self, data: DataSet, items: Iterable[int], adapter: Parameters | None, *, learn: bool = False) -> None:
        self.data, self.adapter, self.learn = data, adapter, learn
        self._items = list(items)
        self.whole = self._count(self._items)  # what means are over
        self.start_over()

    def start_over(self) -> None:
        """Nothing is done yet, or what was done is worth nothing."""
        self._left = deque(self._items)
        self._loss = self._right = 0.0
        self.tokens = 0  # of the items that were taken
        if self.learn and self.adapter is not None:
            self.adapter.forget_gradients()

    @property
    def done(self) -> bool:
        return not self._left

    @property
    def next_tokens(self) -> int:
        """Of the item that comes next."""
        return int(self.data.lengths[self._left[0]])

    def take(self) -> tuple[int, Item]:
        number = self._left.popleft()
        self.tokens += int(self.data.lengths[number])
        return number, self.data[number]

    def put_back(self, numbers: list[int]) -> None:
        """Items that were taken last and not settled; they are taken again."""
        self._left.extendleft(reversed(numbers))
        self.tokens -= self.tokens_of(numbers)

    def tokens_of(self, numbers: list[int]) -> int:
        return int(self.data.lengths[numbers].sum())

    def settle(self, numbers: list[int], outcome: Outcome) -> torch.Tensor:
        """Notes the outcome of items that were taken; returns the sum of their losses, which may have a backward. It is
        `Parameters.finish_gradient` that makes it a mean: divided before, gradients of 16 bits might vanish."""
        losses, right = self._score(numbers, outcome)
        self._loss += float(losses.detach()) / self.whole
        self._right += right
        return losses

    @property
    def result(self) -> Evaluation:
        """Of the whole work, once it is done and settled."""
        return Evaluation(self._loss, self._right / self.whole)

    def _count(self, numbers: list[int]) -> int:
        """What means of these items are over."""
        return int(self.data.learned_counts[numbers].sum())

    def _score(self, numbers: list[int], outcome: Outcome) -> tuple[torch.Tensor, float]:
        """The sum of the items' losses, and how many of what counts were right."""
        return -outcome.logprobs.sum(), float(outcome.right.sum())


class References:
    """What the base alone thinks of each pair's two answers: [items, 2] log probabilities, unknown ones not finite."""

    def __init__(self, data: DataSet) -> None:
        self.data = data
        self.logprobs = np.full((len(data), 2), np.nan, dtype=np.float32)

    def missing(self, items: Iterable[int]) -> list[int]:
        return [i for i in items if np.isnan(self.logprobs[i, 0])]


class ReferenceWork(Work):
    """Fills in references; what counts as loss is no matter."""

    def __init__(self, references: References, items: Iterable[int]) -> None:
        super().__init__(references.data, items, None)
        self._references = references

    def _score(self, numbers: list[int], outcome: Outcome) -> tuple[torch.Tensor, float]:
        self._references.logprobs[numbers] = outcome.sums().view(-1, 2).float().cpu().numpy()
        return super()._score(numbers, outcome)


class PreferenceWork(Work):
    """Direct preference optimization (arXiv 2305.18290): the loss of a pair is -log sigmoid(beta * margin), the margin
    being how much more the adapter than the base prefers the preferred answer. Right are pairs with one above 0."""

    def __init__(
        self,
        references: References,
        items: Iterable[int],
        adapter: Parameters,
        beta: float,
        *,
        learn: bool = False,
    ) -> None:
        super().__init__(references.data, items, adapter, learn=learn)
        self._references, self._beta = references, beta

    def _count(self, numbers: list[int]) -> int:
        return len(numbers)

    def _score(self, numbers: list[int], outcome: Outcome) -> tuple[torch.Tensor, float]:
        said = outcome.sums().view(-1, 2)
        gained = said - torch.from_numpy(self._references.logprobs[numbers]).to(said.device)
        margins = gained[:, 0] - gained[:, 1]
        return -logsigmoid(self._beta * margins).sum(), float((margins > 0).sum())
