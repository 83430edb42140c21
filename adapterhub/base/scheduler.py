"""Which sequences run in the next step, and how many tokens of each: continuous batching, chunked prefill, fair owners.

First every running sequence that decodes gets its token, then waiting sequences are admitted, then prompts get what is
left of the step's tokens. Who is admitted and whose prompt comes first is decided between owners by the tokens they
were served (a virtual token counter): the owner with the fewest goes first, and an owner with many requests holds up
nobody with few. An owner who comes back after a pause, or asked for little, starts level with the others, not with
credit.

When the KV cache or the batch is full, sequences give way and are computed again later: the youngest of the owner who
has the most places. What they have produced is kept, and the beginning that is still in the cache is shared, so that
usually little is computed twice.

A prompt whose tokens' log probabilities are asked for is computed from its first token on, in small pieces: a step has
logits for few of its rows only, as each is as wide as the vocabulary.

A step that did not run, for lack of memory, is taken back (`take_back`), and is as if it had not been scheduled. Steps
may have fewer tokens from then on; where they are too few for all that run, sequences take turns.

Source of the counter: Sheng et al., "Fairness in Serving Large Language Models" (2024).
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain as chained
from typing import NamedTuple

from adapterhub.base.batch import KV_BLOCK
from adapterhub.base.blocks import chain
from adapterhub.base.grammar import Matcher
from adapterhub.base.kv import KVCache
from adapterhub.base.request import Request, Token
from adapterhub.swap.hold import Hold

SCORED_ROWS = 64  # of a step: as many tokens of prompts get their log probabilities


@dataclass(eq=False)
class Sequence:
    """A request under way. `computed` of its `tokens` (prompt, then what was produced) are in the KV cache."""

    request: Request
    tokens: list[int]
    rng: random.Random
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)  # of its full blocks, as far as they were needed
    counts: Counter[int] = field(default_factory=Counter)  # of what it produced, for penalties
    scored: list[Token] = field(default_factory=list)  # its prompt's second token and those that follow, where asked
    matcher: Matcher | None = None  # where in its grammar the answer is; giving way does not change it
    hold: Hold | None = None  # on its adapter, from when it comes near the front of the queue until it ends
    arrived: float = field(default_factory=time.monotonic)
    begun: float = math.inf  # when it came into a step first
    found: int | None = None  # tokens of its prompt that were in the cache when it started first
    latest: int = 0  # the number of the last step that it was in
    _drawn: float | None = None  # the number for its next token

    @classmethod
    def of(cls, request: Request, arrived: float | None = None) -> Sequence:
        """`arrived`: by `time.monotonic`; None for now."""
        matcher = None if request.grammar is None else request.grammar.start()
        sequence = cls(request, list(request.prompt), random.Random(request.sampling.seed), matcher=matcher)
        sequence.arrived = sequence.arrived if arrived is None else arrived
        return sequence

    @property
    def owner(self) -> str:
        return self.request.owner

    @property
    def produced(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def pending(self) -> int:
        """Tokens not in the cache yet: 1 while decoding."""
        return len(self.tokens) - self.computed

    def draw(self) -> float:
        """A number in [0, 1) that decides on its next token: the same again until there is one."""
        if self._drawn is None:
            self._drawn = self.rng.random()
        return self._drawn

    def append(self, token: int) -> None:
        """Its next token is there."""
        self.tokens.append(token)
        self.counts[token] += 1
        self._drawn = None
        if self.matcher is not None:
            self.matcher.accept(token)

    @property
    def ready(self) -> bool:
        """Its adapter is on the device, or it needs none."""
        return self.request.adapter is None or (self.hold is not None and self.hold.ready)

    def name(self, index: int) -> bytes:
        """The name of its block `index`, all of whose tokens are known."""
        while len(self.names) <= index:
            at = len(self.names)
            before = self.names[-1] if self.names else self._salt
            self.names.append(chain(before, self.tokens[at * KV_BLOCK : (at + 1) * KV_BLOCK]))
        return self.names[index]

    @property
    def shareable(self) -> int:
        """How many blocks it may find in the cache: at least one token must be computed, to sample from, and each that
        the log probability of the next is still to come from."""
        return (len(self.scored) if self.unscored else len(self.tokens) - 1) // KV_BLOCK

    @property
    def unscored(self) -> int:
        """Tokens of its prompt whose log probabilities are asked for and not known."""
        asked = self.request.sampling.prompt_logprobs is not None
        return len(self.request.prompt) - 1 - len(self.scored) if asked else 0

    def scores(self, tokens: int) -> range:
        """From which of its tokens, of the next so many, log probabilities of the tokens that follow them are made."""
        known = len(self.scored)
        return range(known, min(self.computed + tokens, known + self.unscored))

    def within(self, rows: int) -> int:
        """How many of its pending tokens can be computed without more than `rows` of these."""
        return self.pending if self.unscored <= rows else len(self.scored) + rows - self.computed

    def follows(self, other: Sequence) -> bool:
        """Whether the block that `other` is computing now is also in the beginning of this one."""
        at = other.computed // KV_BLOCK
        return (
            self.owner == other.owner
            and at < min(self.shareable, len(other.tokens) // KV_BLOCK)
            and (self.name(at) == other.name(at))
        )

    @property
    def _salt(self) -> bytes:
        """What keys and values depend on besides tokens, and whose they are."""
        adapter = self.request.adapter
        return repr((self.owner, adapter.version if adapter else None, adapter.digest if adapter else None)).encode()


class Work(NamedTuple):
    """`tokens` more of `sequence` in this step."""

    sequence: Sequence
    tokens: int

    @property
    def samples(self) -> bool:
        """Whether the step ends with a new token of this sequence."""
        return self.tokens == self.sequence.pending and self.sequence.request.sampling.max_tokens > 0

    @property
    def scores(self) -> range:
        """The sequence's tokens from which log probabilities of its prompt are made in this step."""
        return self.sequence.scores(self.tokens)


class Scheduler:
    """Owns the queues and the running set. Only the engine's thread may call this."""

    def __init__(self, kv: KVCache, max_batch: int, max_step_tokens: int) -> None:
        self.kv = kv
        self.max_batch = max_batch
        self.max_step_tokens = self.step_tokens = max(max_step_tokens, max_batch)  # `step_tokens`: of the next steps
        self.running: list[Sequence] = []  # oldest first
        self.sought_tokens = 0  # of those that were started, looked for in the cache
        self.shared_tokens = 0  # that were found there instead of computed
        self._waiting: dict[str, deque[Sequence]] = {}  # by owner
        self._by_id: dict[str, Sequence] = {}  # of the request, waiting or running
        self._served: dict[str, int] = {}  # tokens, of the owners that are waiting or running
        self._steps = 0  # that were scheduled
        self._scheduled = 0.0  # when the last one was, by `time.monotonic`

    # -- the queue

    def add(self, sequence: Sequence) -> None:
        owner, wanting = sequence.owner, {*self._waiting, *(s.owner for s in self.running if s.pending > 1)}
        if owner not in wanting:  # who lacked nothing is owed nothing
            level = min(self._served[o] for o in wanting) if wanting else max(self._served.values(), default=0)
            self._served[owner] = max(self._served.get(owner, 0), level)
        self._waiting.setdefault(owner, deque()).append(sequence)
        self._by_id[sequence.request.id] = sequence

    def waiting(self) -> Iterator[Sequence]:
        """The waiting sequences in the order in which they would be admitted: owners in turn, least served first.
        Change the queue only after the last that is asked for."""
        promised = Counter(self._served)  # what they were served, and what was begun for them
        for sequence in self.running:
            promised[sequence.owner] += sequence.pending
        turns = deque(iter(self._waiting[owner]) for owner in sorted(self._waiting, key=promised.__getitem__))
        while turns:
            queue = turns.popleft()
            if (oldest := next(queue, None)) is not None:
                yield oldest
                turns.append(queue)

    @property
    def num_waiting(self) -> int:
        return sum(len(queue) for queue in self._waiting.values())

    def look_ahead(self) -> Iterator[Sequence]:
        """The waiting sequences that come next: those whose adapters should be on their way. Those that wait for the
        store, which may never answer, and those that find no room are among them, and count for none. Change the queue
        only after the last."""
        left = self.max_batch
        for sequence in self.waiting():
            if left == 0:
                return
            yield sequence
            left -= sequence.ready or (sequence.hold is not None and not sequence.hold.away)

    def surplus(self, counts: Callable[[Sequence], bool] = lambda _: True) -> Iterator[Sequence]:
        """Those that run, and count, in the order in which they give way to an owner without a place: the youngest of
        the owner with the most places, for as long as that keeps one."""
        places, left = self._places(), [s for s in reversed(self.running) if counts(s)]
        while left and places[(victim := max(left, key=lambda s: places[s.owner])).owner] > 1:
            yield victim
            left.remove(victim)
            places[victim.owner] -= 1

    def preempt(self, victim: Sequence) -> None:
        """Takes one that runs back into the queue, as its owner's next; it is computed again later."""
        self.running.remove(victim)
        self._release(victim)
        self._waiting.setdefault(victim.owner, deque()).appendleft(victim)

    def get(self, request: str) -> Sequence | None:
        """The sequence of a request, by its id, wherever it is."""
        return self._by_id.get(request)

    def find(self, matches: Callable[[Sequence], bool]) -> list[Sequence]:
        """Of all, in no order between those that wait."""
        return [s for s in chained(self.running, *self._waiting.values()) if matches(s)]

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and gives its KV blocks back."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self._dequeue(sequence)
        self._release(sequence)
        del self._by_id[sequence.request.id]
        if sequence.owner not in self._waiting and all(s.owner != sequence.owner for s in self.running):
            del self._served[sequence.owner]

    # -- a step

    def schedule(self) -> list[Work]:
        """The next step's work, of at most `step_tokens`; empty when nothing can run."""
        self._steps += 1
        self._scheduled = time.monotonic()
        self._make_way()
        work = self._fill()
        while not work and self.running:  # those whose turn it was gave way to the others
            work = self._fill()
        return work

    def take_back(self, work: list[Work]) -> None:
        """The step that was scheduled last did not run."""
        for sequence, tokens in work:
            self._served[sequence.owner] -= tokens

    def advance(self, work: Work, token: int | None, scored: Iterable[Token] = ()) -> None:
        """Records what came of the step that was scheduled last: the work's tokens are in the cache, and `token`, if
        sampled, comes next; `scored` are the next of its prompt, if asked for."""
        sequence = work.sequence
        sequence.scored.extend(scored)
        sequence.begun = min(sequence.begun, self._scheduled)
        sequence.latest = self._steps
        full = sequence.computed // KV_BLOCK
        sequence.computed += work.tokens
        for index in range(full, sequence.computed // KV_BLOCK):
            self.kv.blocks.name(sequence.blocks[index], sequence.name(index), sequence.owner)
        if token is not None:
            sequence.append(token)

    def check_integrity(self) -> None:
        everybody = self.find(lambda _: True)
        self.kv.blocks.check_integrity([block for s in everybody for block in s.blocks])
        assert self._served.keys() == {s.owner for s in everybody}, "counters of owners who have left"
        assert self._by_id == {s.request.id: s for s in everybody}, "the index of requests is wrong"
        assert all(self._waiting.values()), "empty queues"

    # -- how it is done

    def _fill(self) -> list[Work]:
        """Tokens for those whose turn it is."""
        left, work = self.step_tokens, list[Work]()
        places = self._places()
        # who needs a block is given one by those that come later: owners with few places come first
        decoding = [s for s in self._whose_turn() if s.pending == 1]
        for sequence in sorted(decoding, key=lambda s: places[s.owner]):
            left -= self._take(sequence, 1, work)
        self._admit()
        prompts = [s for s in self._whose_turn() if s.pending > 1 or (s.pending == 1 and not _has(work, s))]
        rows = SCORED_ROWS
        while left and prompts:
            sequence = min(prompts, key=lambda s: self._served[s.owner])
            prompts.remove(sequence)
            taken = self._take(sequence, min(sequence.within(rows), left), work)
            left -= taken
            rows -= len(sequence.scores(taken))
        return work

    def _take(self, sequence: Sequence, tokens: int, work: list[Work]) -> int:
        """Adds that much work of a running sequence if the cache has room, and returns how much it was."""
        if not tokens or sequence not in self.running or not self._reserve(sequence, tokens, work):
            return 0
        work.append(Work(sequence, tokens))
        self._served[sequence.owner] += tokens
        return tokens

    def _whose_turn(self) -> list[Sequence]:
        """All that run, in order; where a step has too few tokens for them, those that were in none for longest."""
        if len(self.running) <= self.step_tokens:
            return self.running
        chosen = set(sorted(self.running, key=lambda s: s.latest)[: self.step_tokens])
        return [s for s in self.running if s in chosen]

    def _places(self) -> Counter[str]:
        return Counter(s.owner for s in self.running)

    def _next(self) -> Sequence | None:
        """The waiting sequence to start next. One whose adapter is on its way does not hold up the others, nor does one
        whose beginning is just being computed for another: it will share it."""
        begun = [s for s in self.running if s.pending > 1]
        return next((s for s in self.waiting() if s.ready and not any(map(s.follows, begun))), None)

    def _start(self, sequence: Sequence) -> bool:
        """Moves a waiting sequence into the running set if the batch and the cache have room."""
        if len(self.running) >= self.max_batch:
            return False
        shared = self.kv.blocks.share([sequence.name(i) for i in range(sequence.shareable)])
        wanted = len(sequence.tokens) + min(1, sequence.request.sampling.max_tokens)
        blocks = self.kv.blocks.allocate(self.kv.blocks_for(wanted) - len(shared))
        if blocks is None:
            self.kv.blocks.release(shared)
            return False
        self._dequeue(sequence)
        sequence.blocks = shared + blocks
        sequence.computed = len(shared) * KV_BLOCK
        if sequence.found is None:
            sequence.found = sequence.computed
        self.sought_tokens += len(sequence.tokens)
        self.shared_tokens += sequence.computed
        self.running.append(sequence)
        return True

    def _make_way(self) -> None:
        """Starts those who come next and have no place yet; owners with several places lose some to them."""
        while (newcomer := self._next()) is not None and newcomer.owner not in self._places():
            surplus = self.surplus()
            while not self._start(newcomer):
                if (victim := next(surplus, None)) is None:
                    return
                self.preempt(victim)

    def _admit(self) -> None:
        """Starts those who come next, in order: a long prompt must not starve behind short ones."""
        while len(self.running) < self.max_batch and (sequence := self._next()) is not None and self._start(sequence):
            pass

    def _victim(self, work: list[Work]) -> Sequence | None:
        """Who gives way: of those without work in this step, the youngest of the owner with the most places."""
        places = self._places()
        idle = (s for s in reversed(self.running) if not _has(work, s))
        return max(idle, key=lambda s: places[s.owner], default=None)

    def _reserve(self, sequence: Sequence, tokens: int, work: list[Work]) -> bool:
        """Makes sure of KV blocks for `tokens` more; others give way for them if they must, or it does itself."""
        needed = self.kv.blocks_for(sequence.computed + tokens) - len(sequence.blocks)
        if needed <= 0:
            return True
        while (blocks := self.kv.blocks.allocate(needed)) is None:
            victim = self._victim(work)
            assert victim is not None, "the sequence itself has no work yet"
            self.preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks += blocks
        return True

    def _dequeue(self, sequence: Sequence) -> None:
        queue = self._waiting[sequence.owner]
        queue.remove(sequence)
        if not queue:
            del self._waiting[sequence.owner]

    def _release(self, sequence: Sequence) -> None:
        self.kv.blocks.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0


def _has(work: list[Work], sequence: Sequence) -> bool:
    return any(w.sequence is sequence for w in work)
