"""Training beside serving, on the engine's thread: gives a work its pieces when `Share` allows, and measures both."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypedDict, Unpack

import torch

from adapterhub.base.share import Share

log = logging.getLogger(__name__)
_PAUSE_SECONDS = 1.0  # of a work that failed
_RECENT_SECONDS = 10.0  # of which is told what training had


class PieceAbandoned(Exception):
    """There was no memory for a piece of training, or its memory was needed. It is as if it had not been begun."""


class IdleWork(Protocol):
    """Training, in pieces whose length the engine chooses. It deals with its own errors."""

    @property
    def running(self) -> int:
        """How many runs are under way."""
        ...

    def step(self, tokens: int, give_way: Callable[[], None]) -> int:
        """One piece on the engine's thread, of about `tokens` tokens and no more where that can be. It calls `give_way`
        every few milliseconds, between two layers of the base, say; requests may be served meanwhile.

        Returns how many tokens it trained; 0 when there is nothing to do at the moment: it is asked again after
        `Engine.wake`. Raises PieceAbandoned, also when that comes out of `give_way`: it is asked again soon, and has to
        make the piece smaller itself."""
        ...

    def lose(self) -> None:
        """The device is lost, and with it what is not saved elsewhere; `step` is not called any more."""
        ...


class Demand(TypedDict):
    """Who wants the device besides training."""

    running: bool  # streams have tokens to come
    first: bool  # somebody waits for a first token


class _Piece(NamedTuple):
    end: float  # by `time.perf_counter`
    seconds: float
    tokens: int


class SpareTime:
    """What the engine has left between the steps of serving and when nobody asks."""

    def __init__(self, share: Share, serving_threads: int | None) -> None:
        """`serving_threads` are torch's within a step of serving; None: as many as in training."""
        self._share = share
        self._work: IdleWork | None = None
        self._work_left = False  # as far as is known
        self._paused_until = 0.0  # by `time.monotonic`
        self._since = time.perf_counter()  # what comes next began then
        self._before = 0.0  # seconds of the piece under way, before it was interrupted
        self._recent: deque[_Piece] = deque()
        self._tokens = 0  # since the start
        self._abandoned = 0  # pieces, since the start
        self._training_threads = self._threads = torch.get_num_threads()
        self._serving_threads = serving_threads or self._training_threads

    def take(self, work: IdleWork) -> None:
        """The spare time is `work`'s from now on."""
        self._work, self._work_left = work, True

    def wake(self) -> None:
        """The work has something to do again."""
        self._work_left = self._work is not None

    @property
    def wanted(self) -> bool:
        """There is something to do, now or after a second."""
        return self._work_left

    def train(self, give_way: Callable[[], None], **demand: Unpack[Demand]) -> bool:
        """A piece of the work, if there is something to do and it may be now; False if not. For `give_way`
        see `IdleWork.step`."""
        if self._work is None or not self._work_left or time.monotonic() < self._paused_until:
            return False
        tokens = self._share.next_tokens(**demand)
        if not tokens:
            return False
        self._begin_piece()
        self._before = 0.0
        try:
            done = self._work.step(tokens, give_way)
            self._work_left = done > 0
        except PieceAbandoned as why:
            log.warning("a piece of training is done again, smaller: %s", why)
            self._abandoned += 1
            self._share.abandoned(self._lap())
            return True
        except Exception:
            log.exception("idle work failed; trying again in %g s", _PAUSE_SECONDS)
            self._paused_until = time.monotonic() + _PAUSE_SECONDS
            self._share.abandoned(self._lap())
            return True
        seconds = self._lap()
        if done:
            self._share.trained(seconds, done, before=self._before)
            self._tokens += done
            self._note(seconds, done)
        return True

    @property
    def overdue(self) -> bool:
        """The piece that is under way has taken as long as it may without looking who asks."""
        return time.perf_counter() - self._since >= self._share.pause_left

    def interrupt(self) -> None:
        """Serving comes first for a while."""
        seconds = self._lap()
        self._before += seconds
        self._share.interrupted(seconds)
        self._note(seconds, 0)

    def may_go_on(self, **demand: Unpack[Demand]) -> bool:
        """Whether an interrupted piece may go on now."""
        return self._share.next_tokens(**demand) > 0

    def go_on(self) -> None:
        """The interrupted piece is taken up again."""
        self._begin_piece()

    def begin_step(self) -> None:
        """A step of serving is next."""
        self._use_threads(self._serving_threads)

    def end_step(self, *, streams: bool) -> None:
        """It is over; `streams`: it made a token that follows another."""
        self._share.served(self._lap(), streams=streams)

    def slept(self) -> None:
        """The engine waited for something to do, though there might have been training to do."""
        seconds = self._lap()
        if self._work_left:
            self._share.waited(seconds)

    def lose(self) -> None:
        """The device is lost."""
        if self._work is not None:
            self._work.lose()

    def stats(self) -> dict[str, Any]:
        """`out_of_memory` are pieces that had to be done again. `share` and `tokens_per_second` are of the last ten
        seconds. The latencies are between two tokens of a stream, as they were and as they would have been without
        training; None before there were any."""
        self._forget(time.perf_counter())
        return {
            "runs": self._work.running if self._work else 0,
            "tokens": self._tokens,
            "out_of_memory": self._abandoned,
            "share": round(min(1.0, sum(p.seconds for p in self._recent) / _RECENT_SECONDS), 3),
            "tokens_per_second": round(sum(p.tokens for p in self._recent) / _RECENT_SECONDS, 1),
            "latency_slo": self._share.slo,
            "p95_ms": _milliseconds(self._share.p95),
            "idle_p95_ms": _milliseconds(self._share.idle_p95),
        }

    def _begin_piece(self) -> None:
        self._use_threads(self._training_threads)
        self._since = time.perf_counter()

    def _note(self, seconds: float, tokens: int) -> None:
        self._recent.append(_Piece(self._since, seconds, tokens))
        self._forget(self._since)

    def _lap(self) -> float:
        """Seconds since the last step, piece or sleep ended."""
        since, self._since = self._since, time.perf_counter()
        return self._since - since

    def _forget(self, now: float) -> None:
        while self._recent and self._recent[0].end < now - _RECENT_SECONDS:
            self._recent.popleft()

    def _use_threads(self, count: int) -> None:
        if count != self._threads:
            torch.set_num_threads(count)
            self._threads = count


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 2)
