"""How training shares the device with those who wait for tokens, as plain data: told what each step of serving and each
piece of training cost, it says how many tokens the next piece may have. It has no clock, and knows no model.

A piece of training can be interrupted between any two layers of the base, and goes on later. What it takes between two
steps of serving delays the next token of every stream. What may not grow is the 95th percentile of the time between a
stream's tokens, by more than the factor `slo` over what it is without training. Two ways are left:

- a piece that is done in less than (slo - 1) steps delays no token by too much, and may come after every step. The
  base's weights are read twice for a piece and once for a step, so that few are as short as that: large batches, a high
  slo;
- up to 5% of the tokens may be late by however much. One step in 22 may wait in a long pause, in which large pieces are
  worked on. Those that are late by themselves count too, so that a machine with troubles of its own gives training
  less. Long is 0.6 seconds, for a stream should not seem to hang; and of the time, training takes no more than 60%,
  and is given no less than 4%.

While somebody waits for a first token, training has the 4% alone. When nobody asks, it has all.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

_EVERY = 22  # steps for each that may be late: less than 5%, and so in any 220 tokens of a stream
_PAUSE = 0.6  # seconds of a long one
_MOST, _LEAST = 0.6, 0.04  # of the time, while both want the device
_STEPS = 256  # whose costs are remembered
_MOST_DEBT = 3.0  # late steps that are still paid for
_TOLERANCE = 1.5  # times as long as it was to be, a short piece is still short
_PATIENCE = 64 * _EVERY  # steps: how long a short piece is not tried again, at most


class Share:
    """`slo` is at least 1; no piece has more than `most_tokens`."""

    def __init__(self, slo: float, most_tokens: int) -> None:
        self.slo = slo
        self.costs = PieceCosts(most_tokens)
        self._idle: deque[float] = deque(maxlen=_STEPS)  # seconds of steps with tokens for streams, by themselves
        self._gaps: deque[float] = deque(maxlen=_STEPS)  # the same with the pieces before them
        self._pause = 0.0  # seconds of the pieces since the last step
        self._halfway = False  # through a piece that was interrupted
        self._credit = 1.0  # steps that may be late; below 0 where more were
        self._alone = True  # nobody asked when the last piece began
        self._due = 0.0  # seconds that training may have, of its most
        self._owed = 0.0  # seconds that it must have, of its least
        self._room = 0.0  # seconds that the piece since the last step was to have, if it was a short one
        self._short_works = False  # the last short piece kept to that
        self._patience, self._steps_to_wait = _EVERY, 0  # until one is tried again, after one did not

    # -- what has happened

    def served(self, seconds: float, *, streams: bool) -> None:
        """A step of serving, without the pieces before it; `streams`: it made a token that follows another."""
        self.waited(seconds)
        self._due = min(self._due + seconds * _MOST / (1 - _MOST), _PAUSE)
        if streams:
            self._note_gap(seconds)
        self._pause = self._room = 0.0

    def waited(self, seconds: float) -> None:
        """Training had to wait, and nothing was served either."""
        self._owed = min(self._owed + seconds * _LEAST, _PAUSE)

    def trained(self, seconds: float, tokens: int, *, before: float = 0.0) -> None:
        """A piece, or what was left of one that was interrupted after `before` seconds."""
        self._halfway = False
        self.costs.note(before + seconds, tokens)
        self._note_training(seconds)

    def interrupted(self, seconds: float) -> None:
        """A piece that is not done yet makes way for serving after so long."""
        self._halfway = True
        self._note_training(seconds)

    def abandoned(self, seconds: float) -> None:
        """A piece came to nothing after so long, or so long after it was interrupted."""
        self._halfway = False
        self._note_training(seconds)

    def _note_training(self, seconds: float) -> None:
        if not self._alone:
            self._pause += seconds
            self._due -= seconds
            self._owed = max(self._owed - seconds * (1 - _LEAST), -seconds)

    # -- what may happen

    def next_tokens(self, *, running: bool, first: bool) -> int:
        """How many tokens a piece may have now; 0: serve. `running`: streams have tokens to come; `first`: somebody
        waits for a first token."""
        self._alone = not (running or first)
        if self._alone:
            return self.costs.most  # the larger, the cheaper; who comes interrupts it
        if self._pause:
            return 0 if first or self._room else self._long_tokens(self._short_tokens(self._short_room))
        if self._owed >= _PAUSE:
            return self._long_tokens(self._short_tokens(self._short_room))
        return 0 if first else self._between_tokens()

    # -- what is known

    @property
    def pause_left(self) -> float:
        """Seconds that training may still take before the next step, without what is under way."""
        return _PAUSE - self._pause

    @property
    def idle_p95(self) -> float | None:
        """Seconds between two tokens of a stream without training: a step's. None before there were any."""
        return _p95(self._idle)

    @property
    def p95(self) -> float | None:
        """The same as it was."""
        return _p95(self._gaps)

    # -- how

    def _note_gap(self, seconds: float) -> None:
        gap = self._pause + seconds
        if not self._pause or self._room:  # after a long piece, caches are cold
            self._idle.append(seconds)
        self._gaps.append(gap)
        late = gap > self.slo * (_p95(self._idle) or seconds)
        self._credit = max(min(1.0, self._credit + 1 / _EVERY) - late, -_MOST_DEBT)
        self._steps_to_wait = max(0, self._steps_to_wait - 1)
        if self._room:
            self._short_works = self._pause <= _TOLERANCE * self._room
            self._patience = _EVERY if self._short_works else min(2 * self._patience, _PATIENCE)
            self._steps_to_wait = 0 if self._short_works else self._patience

    def _between_tokens(self) -> int:
        may_be_late = self._credit >= 1
        room = self._short_room
        could = self._short_tokens(room)
        may_be_short = not self._halfway and not self._steps_to_wait and self._due >= room
        short = could if may_be_short else 0
        if may_be_late and self._due >= _PAUSE and (self._short_works or not short):
            return self._long_tokens(could)
        if not short or not (may_be_late or (self._short_works and self._credit > 0)):
            return 0
        self._room = room
        return short

    @property
    def _short_room(self) -> float:
        """Seconds of a piece that may come after every step."""
        return (self.slo - 1) * statistics.median(self._idle) if self._idle else 0.0

    def _short_tokens(self, room: float) -> int:
        """Of a piece that is done in that time; 0 where none is so short, as far as is known, or its tokens would cost
        more than double of what they cost in a long one."""
        costs = self.costs
        if room < costs.seconds(1):
            return 0
        short, long = costs.tokens(room), costs.most
        return short if costs.seconds(short) * long <= 2 * costs.seconds(long) * short else 0

    def _long_tokens(self, short: int) -> int:
        """Of a piece in a long pause. It may be interrupted at the pause's end, except where short pieces, of so many
        tokens, could come after every step: these cannot begin before it is done."""
        left = self.pause_left
        if self._halfway or not short:
            return self.costs.most if left > 0 else 0
        return self.costs.tokens(0.75 * left) if left > 0.25 * _PAUSE else 0


class PieceCosts:
    """What a piece costs: so many seconds, and so many for each token, by weighted least squares over the last pieces.
    One that cost more than was thought counts twice, so that sizes fall faster than they rise."""

    _FIRST = 64  # tokens, before anything is known
    _KEPT = 0.8  # of the weight of what is known, with each piece
    _SURPRISE = 2.0
    _SHRINK = 0.05  # how much the seconds of a piece are held to be 0, where all pieces have one size

    def __init__(self, most_tokens: int) -> None:
        self.most = most_tokens
        self._largest = 0
        self._fixed = self._per_token = 0.0
        self._sums = [0.0] * 5  # of w, w t, w s, w t t, w t s: t tokens, s seconds, w weights

    def note(self, seconds: float, tokens: int) -> None:
        weight = self._SURPRISE if seconds > self.seconds(tokens) else 1.0
        for i, value in enumerate((1.0, tokens, seconds, tokens * tokens, tokens * seconds)):
            self._sums[i] = self._KEPT * self._sums[i] + weight * value
        self._largest = max(self._largest, tokens)
        self._fit()

    @property
    def known(self) -> bool:
        """Some piece has been seen."""
        return self._largest > 0

    def seconds(self, tokens: float) -> float:
        """Of one piece."""
        return self._fixed + self._per_token * tokens

    def seconds_of_all(self, tokens: float) -> float:
        """Of so many tokens in as few pieces as can be."""
        return math.ceil(tokens / self.most) * self._fixed + self._per_token * tokens

    def tokens(self, seconds: float) -> int:
        """As many as that time is enough for, and at least 1; at most double of what was ever tried."""
        if not self.known:
            return min(self._FIRST, self.most)
        enough = (seconds - self._fixed) / self._per_token
        return max(1, int(min(enough, 2 * self._largest, self.most)))

    def _fit(self) -> None:
        w, wt, ws, wtt, wts = self._sums
        held = w * (1 + self._SHRINK)
        fixed = (ws * wtt - wt * wts) / (held * wtt - wt * wt)
        self._fixed = min(max(0.0, fixed), 0.9 * min(ws / w, wts / wt))
        self._per_token = (wts - self._fixed * wt) / wtt


def _p95(values: deque[float]) -> float | None:
    return sorted(values)[int(0.95 * len(values))] if values else None
