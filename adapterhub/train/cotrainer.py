"""Trains the jobs of many users at once: one forward and backward of the shared base over items of all of them.

It is the engine's idle work. Each piece takes items of several runs, each with its own adapter, ranks and targets
mixed, end to end without padding; the runs' gradients meet nowhere. A run that fails, fails alone.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from adapterhub.base.model import Base
from adapterhub.errors import HubError, ServerFault
from adapterhub.train.news import Saved
from adapterhub.train.packing import Item, forward
from adapterhub.train.run import Run
from adapterhub.train.work import Work

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Place:
    """A run that is under way."""

    run: Run
    weight: float
    works: Iterator[Work]
    work: Work
    served: float = 0.0  # tokens over weight; who has least goes first
    alone: bool = False  # until this work is done, after a micro-batch with others has failed


@dataclass
class _Part:
    """What one run has in a micro-batch."""

    place: _Place
    numbers: list[int]
    items: list[Item]


class CoTrainer:
    """`add` and `take_out` may be called from any thread; `wake` must make the engine call `step` again."""

    def __init__(self, base: Base, wake: Callable[[], None]) -> None:
        self._base, self._wake = base, wake
        self._asked: deque[Callable[[], None]] = deque()
        self._places: dict[Run, _Place] = {}
        self._give_way: Callable[[], None] = lambda: None

    def add(self, run: Run, weight: float = 1.0) -> None:
        """Trains `run`, which tells how it goes. Of two runs, one of twice the weight has twice the tokens."""
        self._ask(lambda: self._begin(run, weight))

    def take_out(self, run: Run, *, save: bool) -> None:
        """Ends a run before its next micro-batch. With `save` it tells a last snapshot, unless it has ended already."""
        self._ask(lambda: self._end(run, save))

    @property
    def running(self) -> int:
        """How many runs are under way; for any thread."""
        return len(self._places)

    # -- the engine's thread

    def step(self, tokens: int, give_way: Callable[[], None] = lambda: None) -> int:
        """One micro-batch of about `tokens` tokens, at least one item; returns its tokens, 0 with nothing to do. Calls
        `give_way` between any two layers."""
        self._give_way = give_way
        while self._asked:
            self._asked.popleft()()
        parts = self._collect(tokens)
        if not parts:
            return 0
        self._carry_out(parts)
        for place in (p.place for p in parts):
            if place.run in self._places and place.work.done:
                self._go_on(place)
        return sum(len(e.tokens) for part in parts for item in part.items for e in item)

    def _ask(self, action: Callable[[], None]) -> None:
        self._asked.append(action)
        self._wake()

    def _begin(self, run: Run, weight: float) -> None:
        works = run.works()
        served = min((p.served for p in self._places.values()), default=0.0)
        first = self._next(run, works)
        if first is not None:
            self._places[run] = _Place(run, weight, works, first, served)

    def _end(self, run: Run, save: bool) -> None:
        if self._places.pop(run, None) is not None and save:
            run.tell(Saved(run.snapshot(), last=True))

    def _collect(self, tokens: int) -> list[_Part]:
        """Items for a micro-batch, from the runs that have had least; to learn from, or to be measured on, not both."""
        parts: dict[_Place, _Part] = {}
        room, learn = tokens, None
        open_places = set(self._places.values())
        while open_places:
            place = min(open_places, key=lambda p: p.served)
            work = place.work
            mixed = learn is not None and (work.learn is not learn or place.alone)
            if work.done or mixed or (parts and work.next_tokens > room):
                open_places.remove(place)
                continue
            if place.alone:
                open_places = {place}
            learn = work.learn
            size = work.next_tokens
            number, item = work.take()
            part = parts.setdefault(place, _Part(place, [], []))
            part.numbers.append(number)
            part.items.append(item)
            place.served += size / place.weight
            room -= size
        return list(parts.values())

    def _carry_out(self, parts: list[_Part]) -> None:
        """The micro-batch. Where it fails, each run does its present work again by itself, and only the one at fault
        ends."""
        try:
            self._forward(parts)
        except Exception as error:
            if len(parts) == 1:
                self._fail(parts[0].place.run, error)
                return
            log.warning("a micro-batch of %d runs failed (%s); each goes on alone", len(parts), error)
            for place in (p.place for p in parts):
                place.work.start_over()
                place.alone = True

    def _forward(self, parts: list[_Part]) -> None:
        learn = parts[0].place.work.learn
        outcomes = forward(
            self._base, [(p.place.work.adapter, p.items) for p in parts], record=learn, give_way=self._give_way
        )
        losses = [p.place.work.settle(p.numbers, o) for p, o in zip(parts, outcomes, strict=True)]
        if learn:
            torch.stack(losses).sum().backward()

    def _go_on(self, place: _Place) -> None:
        work = self._next(place.run, place.works)
        if work is not None:
            place.work, place.alone = work, False
        else:
            self._places.pop(place.run, None)

    def _next(self, run: Run, works: Iterator[Work]) -> Work | None:
        """The run's next work that has something to do; None when it has ended."""
        try:
            for work in works:
                if not work.done:
                    return work
        except Exception as error:
            self._fail(run, error)
        return None

    def _fail(self, run: Run, error: Exception) -> None:
        self._places.pop(run, None)
        if not isinstance(error, HubError):
            log.exception("a training run failed", exc_info=error)
            error = ServerFault(f"Training failed: {error}")
        run.tell(error)
