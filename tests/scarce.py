"""Memory that runs out, on a CPU, where it would on a GPU: in the middle of a forward, and when all is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from adapterhub.base.batch import Batch
from adapterhub.base.model import Base
from adapterhub.base.runner import Outcome, Runner
from adapterhub.base.scheduler import Work
from adapterhub.train.cotrainer import CoTrainer

NO_MEMORY = "CUDA out of memory. Tried to allocate 2.00 MiB."
PLENTY = 10**9


class Memory:
    """Has room for so many tokens of one forward of `base`, without those that a piece of training holds. A forward
    with more ends before its last layer: then others have written to the KV cache."""

    def __init__(self, base: Base, room: int = PLENTY) -> None:
        self._base = base
        self.room: Callable[[Batch], int] = lambda _: room
        self.held = 0  # tokens of the piece of training that is under way
        self.failures = 0  # forwards that had not enough

    def _check(self, *_: Any) -> None:
        batch = self._base.slot.batch
        assert batch is not None
        if batch.pool is None and batch.give_way is not None:
            self.held = len(batch.tokens)
            needed = self.held
        else:
            needed = len(batch.tokens) + self.held
        if needed > self.room(batch):
            self.failures += 1
            raise torch.OutOfMemoryError(NO_MEMORY)

    @contextmanager
    def watched(self) -> Iterator[None]:
        hook = self._base.model.model.layers[-1].register_forward_pre_hook(self._check)
        try:
            yield
        finally:
            hook.remove()


class Holding(CoTrainer):
    """Its pieces hold memory from their beginning to their end."""

    memory: Memory

    def step(self, tokens: int, give_way: Callable[[], None] = lambda: None) -> int:
        try:
            return super().step(tokens, give_way)
        finally:
            self.memory.held = 0


def fail_after(runner: Runner, is_short: Callable[[Sequence[Work]], bool]) -> None:
    """From now on a step for which that is so runs to its end, and then has no memory."""
    run = runner.run

    def scarce(work: list[Work]) -> list[Outcome]:
        outcomes = run(work)
        if is_short(work):
            raise torch.OutOfMemoryError(NO_MEMORY)
        return outcomes

    runner.run = scarce  # type: ignore[method-assign]
