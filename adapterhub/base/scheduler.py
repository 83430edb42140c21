"""Which sequences run in the next step, and how many tokens of each: continuous batching with chunked prefill.

First every running sequence that decodes gets its token, then prompts get what is left of the step's tokens, then
waiting sequences whose adapter is on the device are admitted. When the KV cache is full, the youngest running sequence
gives its blocks back and starts over later; what it has produced is kept.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from adapterhub.base.kv import KVCache
from adapterhub.base.request import Request
from adapterhub.swap.tiers import Hold


@dataclass(eq=False)
class Sequence:
    """A request under way. `computed` of its `tokens` (prompt, then what was produced) are in the KV cache."""

    request: Request
    tokens: list[int]
    rng: random.Random
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    hold: Hold | None = None  # on its adapter, from when it comes near the front of the queue until it ends

    @classmethod
    def of(cls, request: Request) -> Sequence:
        return cls(request, list(request.prompt), random.Random(request.sampling.seed))

    @property
    def produced(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def pending(self) -> int:
        """Tokens not in the cache yet: 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def ready(self) -> bool:
        """Its adapter is on the device, or it needs none."""
        return self.request.adapter is None or (self.hold is not None and self.hold.ready)


class Work(NamedTuple):
    """`count` more tokens of `sequence` in this step."""

    sequence: Sequence
    count: int

    @property
    def samples(self) -> bool:
        """Whether the step ends with a new token of this sequence."""
        return self.count == self.sequence.pending


class Scheduler:
    """Owns the queue and the running set. Only the engine's thread may call this."""

    def __init__(self, kv: KVCache, max_batch: int, max_step_tokens: int) -> None:
        self.kv = kv
        self.max_batch = max_batch
        self.max_step_tokens = max(max_step_tokens, max_batch)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def look_ahead(self) -> list[Sequence]:
        """The waiting sequences that come next: those whose adapters should be on their way."""
        return [s for _, s in zip(range(self.max_batch), self.waiting, strict=False)]

    def schedule(self) -> list[Work]:
        """The next step's work; empty when nothing can run."""
        left = self.max_step_tokens
        work: list[Work] = []
        for decoding in (True, False):
            for sequence in [s for s in self.running if (s.pending == 1) is decoding]:
                count = min(sequence.pending, left)
                if count and sequence in self.running and self._reserve(sequence, count, work):
                    work.append(Work(sequence, count))
                    left -= count
        self._admit(work, left)
        return work

    def advance(self, work: Work, token: int | None) -> None:
        """Records a step: `count` tokens are in the cache, and `token`, if sampled, comes next."""
        work.sequence.computed += work.count
        if token is not None:
            work.sequence.tokens.append(token)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees its KV blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._release(sequence)

    def find(self, matches: Callable[[Sequence], bool]) -> list[Sequence]:
        return [s for s in (*self.running, *self.waiting) if matches(s)]

    def check_integrity(self) -> None:
        self.kv.check_integrity([block for s in (*self.running, *self.waiting) for block in s.blocks])

    def _admit(self, work: list[Work], left: int) -> None:
        skipped: list[Sequence] = []
        while self.waiting and left and len(self.running) < self.max_batch:
            sequence = self.waiting.popleft()
            if not sequence.ready:  # its adapter is on its way; the others do not wait for it
                skipped.append(sequence)
                continue
            count = min(sequence.pending, left)
            blocks = self.kv.allocate(self.kv.blocks_for(sequence.pending + 1))
            if blocks is None:  # admitted in order: a long prompt must not starve behind short ones
                skipped.append(sequence)
                break
            sequence.blocks = blocks
            self.running.append(sequence)
            work.append(Work(sequence, count))
            left -= count
        self.waiting.extendleft(reversed(skipped))

    def _reserve(self, sequence: Sequence, count: int, work: list[Work]) -> bool:
        """Makes sure of KV blocks for `count` more tokens; preempts the youngest sequences for them if it must."""
        needed = self.kv.blocks_for(sequence.computed + count) - len(sequence.blocks)
        if needed <= 0:
            return True
        while (blocks := self.kv.allocate(needed)) is None:
            scheduled = {id(w.sequence) for w in work}
            victim = next(s for s in reversed(self.running) if id(s) not in scheduled)
            self.running.remove(victim)
            self._release(victim)
            self.waiting.appendleft(victim)
            if victim is sequence:
                return False
        sequence.blocks += blocks
        return True

    def _release(self, sequence: Sequence) -> None:
        self.kv.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0
