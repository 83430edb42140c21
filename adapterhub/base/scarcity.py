"""When a step finds less memory than it needs: what is given up for it, in which order, and when it is tried again.

Plain data, told how each step went: it frees nothing itself, has no clock, and knows no device. A step that ran out of
memory is taken back, something is given up, and what comes next is scheduled anew, until it fits:

1. a piece of training that is under way: it is trained again later;
2. what is kept only to be faster: the allocator's cache, captured graphs;
3. tokens of a step, as long as every sequence may have one: prompts are computed in smaller chunks;
4. adapters that nobody uses: the pool becomes smaller, for good;
5. sequences of a step: they take turns;
6. the request whose single token does not fit. It alone fails.
"""

from __future__ import annotations

from enum import Enum, auto

_FIRST, _MOST = 16, 1024  # steps that must have gone well before more is tried


class Relief(Enum):
    PIECE = auto()
    CACHES = auto()
    TOKENS = auto()
    POOL = auto()
    REQUEST = auto()


class Allowance:
    """How many tokens may be computed at once: half of what was too many, and double again once as many as may be have
    gone well a few times. Who asks for more too early has to wait longer the next time."""

    def __init__(self, most: int) -> None:
        self.most = self.tokens = most
        self._patience = _FIRST
        self._well = 0  # how often as many as may be went well, since that was changed
        self._trying = False  # it was doubled, and is not known to be right

    def too_many(self, tokens: int, least: int = 1) -> bool:
        """So many were; False, and nothing changed, where fewer than `least` would be left."""
        if tokens <= least:
            return False
        self.tokens = max(least, min(tokens, self.tokens) // 2)
        self._well = 0
        if self._trying:
            self._patience, self._trying = min(2 * self._patience, _MOST), False
        return True

    def went_well(self, tokens: int) -> None:
        if tokens < self.tokens:  # says nothing of more
            return
        self._well += 1
        if self._well < self._patience:
            return
        if self._trying:
            self._patience = max(_FIRST, self._patience // 2)
        self._well, self._trying = 0, self.tokens < self.most
        self.tokens = min(2 * self.tokens, self.most)


class Scarcity:
    """`failed` says what to give up; all counts are since the start."""

    def __init__(self, most_tokens: int, most_sequences: int) -> None:
        """Of a step, while there is memory enough."""
        self.allowance = Allowance(most_tokens)
        self.failures = 0  # steps that ran out of memory
        self.short = False  # the last one did, and training has to wait
        self._most_sequences = most_sequences
        self._caches = True  # there may be some
        self._pool = True  # it may have something to give
        self._patience = _FIRST
        self._well = _FIRST  # steps that went well, since the last that did not

    @property
    def may_capture(self) -> bool:
        """Whether memory may be taken for graphs."""
        return not self.short and self._well >= self._patience

    def failed(self, tokens: int, *, piece: bool) -> Relief:
        """A step of so many tokens found no memory, within a `piece` of training or not."""
        if not self.short:
            soon = self._well < 2 * self._patience  # after graphs were allowed again, if they were
            self._patience = min(2 * self._patience, _MOST) if self.failures and soon else _FIRST
        self.failures += 1
        self.short, self._well = True, 0
        return Relief.PIECE if piece else self._next(tokens)

    def pool_is_spent(self, tokens: int) -> Relief:
        """After `Relief.POOL`, where it gave nothing: what to give up instead."""
        self._pool = False
        return self._next(tokens)

    def went_well(self, tokens: int) -> None:
        self.allowance.went_well(tokens)
        self._well += 1
        self.rest()

    def rest(self) -> None:
        """There is nothing to compute any more, or it found its memory: what comes next may have what there is."""
        self.short, self._caches, self._pool = False, True, True

    def _next(self, tokens: int) -> Relief:
        if self._caches:
            self._caches = False
            return Relief.CACHES
        if self.allowance.too_many(tokens, self._most_sequences):
            return Relief.TOKENS
        if self._pool:
            return Relief.POOL
        return Relief.TOKENS if self.allowance.too_many(tokens) else Relief.REQUEST
