"""Trains the jobs of many users at once: one forward and backward of the shared base over items of all of them.

It is the engine's idle work. Each piece takes items of several runs, each with its own adapter, ranks and targets
mixed, end to end without padding; the runs' gradients meet nowhere. A run that fails, fails alone.

A piece for which there is no memory, or whose memory serving needs, is undone, and the next ones are smaller for a
while. A run fails for lack of memory only where a single item does not fit.
"""

from __future__ import annotations

import logging
import math
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch

from adapterhub.base.idle import PieceAbandoned
from adapterhub.base.lost import check_device, out_of_memory, told_briefly
from adapterhub.base.model import Base
from adapterhub.base.scarcity import Allowance
from adapterhub.base.share import PieceCosts
from adapterhub.errors import HubError, ServerFault
from adapterhub.train.dataset import Example
from adapterhub.train.news import Lost, Saved, TakenOut
from adapterhub.train.packing import Forward, Item
from adapterhub.train.parameters import Parameters
from adapterhub.train.run import Run
from adapterhub.train.work import Work

log = logging.getLogger(__name__)
_LARGE = 1024  # tokens of a piece, as far as costs are told: larger ones cost hardly less for each token
_TRIAL_TOKENS = 64  # of an example
_TRIAL = (1, 1, 4)  # examples of the pieces that are tried out


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
    settled: bool = False  # its outcome is noted, and of its gradient perhaps some

    @property
    def tokens(self) -> int:
        return self.place.work.tokens_of(self.numbers)

    def undo(self) -> None:
        """As if it had not been taken; with it goes what its work had added up before, where that cannot be told from
        what this part has added."""
        self.place.served -= self.tokens / self.place.weight
        if self.settled:
            self.place.work.start_over()
        else:
            self.place.work.put_back(self.numbers)


class CoTrainer:
    """`add` and `take_out` may be called from any thread; `wake` must make the engine call `step` again."""

    def __init__(self, base: Base, wake: Callable[[], None]) -> None:
        self.base = base
        self._forward, self._wake = Forward(base), wake
        self._asked: deque[Callable[[], None]] = deque()
        self._joining: set[Run] = set()  # that were added, and have no place yet
        self._lost = False
        self._asking = threading.Lock()  # guards `_asked`, `_joining` and `_lost`
        self._places: dict[Run, _Place] = {}
        self._allowance = Allowance(sys.maxsize)  # tokens of a piece
        self._retried: tuple[Run, int] | None = None  # the item for which alone there was no memory just now
        self._give_way: Callable[[], None] = lambda: None
        self._away = 0.0  # seconds that others had the device in the middle of a piece
        self.costs = PieceCosts(_LARGE)  # of pieces that learn, by themselves; for any thread to look at

    def try_out(self) -> None:
        """Trains a few tokens for nobody when there is time, so that it is known what a piece costs."""
        with self._asking:
            self._asked.append(self._try_out)
        self._wake()

    def add(self, run: Run, weight: float = 1.0) -> None:
        """Trains `run`, which tells how it goes. Of two runs, one of twice the weight has twice the tokens."""
        with self._asking:
            lost = self._lost
            if not lost:
                self._joining.add(run)
                self._asked.append(lambda: self._begin(run, weight))
        if lost:
            run.tell(Lost())
        self._wake()

    def take_out(self, run: Run, *, save: bool) -> None:
        """Ends a run before its next micro-batch. Unless it has ended already it tells so, with `save` by a last
        snapshot."""
        with self._asking:
            self._asked.append(lambda: self._end(run, save))
        self._wake()

    @property
    def lost(self) -> bool:
        """Its device is, and nothing is trained here any more; for any thread."""
        return self._lost

    @property
    def running(self) -> int:
        """How many runs are under way; for any thread."""
        return len(self._places)

    # -- the engine's thread

    def step(self, tokens: int, give_way: Callable[[], None] = lambda: None) -> int:
        """One micro-batch of about `tokens` tokens, at least one item; returns its tokens, 0 with nothing to do. Calls
        `give_way` between any two layers. Raises PieceAbandoned when there is no memory for it, or `give_way` says so.
        """
        self._give_way = give_way
        while action := self._next_action():
            action()
        parts = self._collect(min(tokens, self._allowance.tokens))
        if not parts:
            self._forward.release()
            return 0
        done = sum(part.tokens for part in parts)
        if self._carry_out(parts):
            self._allowance.went_well(tokens)
        for place in (p.place for p in parts):
            if place.run in self._places and place.work.done:
                self._go_on(place)
        return done

    def lose(self) -> None:
        """The device is lost: all runs are told, and what is asked for comes too late."""
        with self._asking:
            self._lost = True
            self._asked.clear()
        for run in (*self._places, *self._joining):
            run.tell(Lost())
        self._places.clear()

    def _next_action(self) -> Callable[[], None] | None:
        with self._asking:
            return self._asked.popleft() if self._asked else None

    def _begin(self, run: Run, weight: float) -> None:
        works = run.works()
        served = min((p.served for p in self._places.values()), default=0.0)
        first = self._next(run, works)
        if first is not None:
            self._places[run] = _Place(run, weight, works, first, served)
        with self._asking:
            self._joining.discard(run)

    def _end(self, run: Run, save: bool) -> None:
        if run not in self._places:
            return
        try:
            news = Saved(run.snapshot(), last=True) if save else TakenOut()
        except Exception as error:
            self._fail(run, error)
        else:
            del self._places[run]
            run.tell(news)

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

    def _carry_out(self, parts: list[_Part]) -> bool:
        """The micro-batch. False where it fails: each run does its present work again by itself, and only the one at
        fault ends. Raises PieceAbandoned."""
        wanted = False  # its memory is, for serving
        try:
            self._learn(parts)
            self._retried = None
            return True
        except PieceAbandoned as error:
            wanted, reason = True, str(error)
        except Exception as error:
            check_device(self.base.device)
            if not out_of_memory(error):
                self._blame(parts, error)
                return False
            reason = told_briefly(error)
        # the error is gone, and with it the memory that its frames held
        tokens = sum(part.tokens for part in parts)
        items = [(part.place.run, number) for part in parts for number in part.numbers]
        for part in parts:
            part.undo()
        self._forward.release()
        if len(items) > 1:
            self._allowance.too_many(tokens)
        elif not wanted:
            if self._retried == items[0]:
                self._fail(parts[0].place.run, _too_large(tokens, reason))
                return False
            self._retried = items[0]
        raise PieceAbandoned(reason)

    def _learn(self, parts: list[_Part]) -> None:
        learn, began = parts[0].place.work.learn, self._clock()
        work = [(p.place.work.adapter, p.items) for p in parts]
        outcomes = self._forward(work, record=learn, give_way=self._make_way)
        losses = []
        for part, outcome in zip(parts, outcomes, strict=True):
            part.settled = True
            losses.append(part.place.work.settle(part.numbers, outcome))
        if learn:
            self._forward.backward(torch.stack(losses).sum())
            self.costs.note(self._clock() - began, sum(part.tokens for part in parts))

    def _try_out(self) -> None:
        parameters = Parameters(self.base.layout, 1, 1.0, self.base.dtype, self.base.device)
        length = min(_TRIAL_TOKENS, self.base.context)
        item = (Example(np.arange(length, dtype=np.int32) % self.base.vocabulary, np.ones(length, np.bool_)),)
        try:
            for turn, count in enumerate(_TRIAL):
                began = self._clock()
                [outcome] = self._forward([(parameters, [item] * count)], record=True, give_way=self._make_way)
                self._forward.backward(-outcome.logprobs.sum())
                parameters.finish_gradient(math.inf, 1)  # waits for the device
                if turn > 0:  # the first one warms up
                    self.costs.note(self._clock() - began, count * length)
        except Exception as error:
            check_device(self.base.device)
            log.warning("training was not tried out (%s): how long a first job takes will not be known", error)

    def _make_way(self) -> None:
        began = perf_counter()
        try:
            self._give_way()
        finally:
            self._away += perf_counter() - began

    def _clock(self) -> float:
        """Seconds, but for those that others had the device."""
        return perf_counter() - self._away

    def _blame(self, parts: list[_Part], error: Exception) -> None:
        if len(parts) == 1:
            self._fail(parts[0].place.run, error)
            return
        log.warning("a micro-batch of %d runs failed (%s); each goes on alone", len(parts), error)
        for place in (p.place for p in parts):
            place.work.start_over()
            place.alone = True

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
        check_device(self.base.device)  # what is lost fails no job: it goes on elsewhere
        self._places.pop(run, None)
        if not isinstance(error, HubError):
            log.exception("a training run failed", exc_info=error)
            error = ServerFault(f"Training failed: {error}")
        run.tell(error)


def _too_large(tokens: int, reason: str) -> ServerFault:
    return ServerFault(
        f"Training failed: there is no memory for {tokens} tokens at once, and one item has as many. Train on shorter "
        f"examples, or have the operator lower --kv-bytes or --device-bytes. ({reason})",
        code="out_of_memory",
    )
