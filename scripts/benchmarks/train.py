"""Fine-tuning on the base that serves, rank 16 on all linears: one job's tokens per second; 8 small jobs at once, from
their creation until all are published, where PEFT trains and saves one after the other; what training and 4 streams
leave of each other; and seconds from ten new examples to an answer of the model that learned them, from the base and on
top of the last version. Contenders take turns."""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from figure import Figure

from adapterhub.base.embedded import EMBEDDED, base_path
from benchmarks.jobs import (
    POLL_SECONDS,
    create,
    data,
    endless_job,
    trained_while,
    training,
    upload,
    wait_for,
    wait_until_together,
)
from benchmarks.load import Answer, Load, complete
from benchmarks.peers import Setting
from benchmarks.process import PeerProcess, peer_process
from benchmarks.server import RANK, Server, chosen, import_adapters, owners, server
from benchmarks.turns import SETTLE_SECONDS

LENGTH, PROMPT, BATCH = 128, 32, 8  # tokens of an example, those that are not learned, and examples of a step
EXAMPLES = 64
JOBS, SMALL_EXAMPLES, SMALL_LENGTH, SMALL_BATCH, SMALL_STEPS = 8, 16, 64, 4, 8
SHARED_MIB = 704  # by jobs, however many: what a piece of 1024 tokens keeps for its backward, and 128 MiB of states
STEADY = {"batch_size": BATCH, "rank": RANK, "held_out": 0}
STREAMS, TOKENS = 4, 128
NEWS = "owner-0/news"  # the adapter that learns ten examples at a time
SECONDS, WARM_SECONDS = 12.0, 4.0  # of a measurement, and of what runs before it
ROUNDS = 3
MIB = 1024**2


def run(setting: Setting) -> list[Figure]:
    with ExitStack() as stack:
        running = stack.enter_context(server())
        peft = None
        if setting.peft:
            peft = stack.enter_context(peer_process("PEFT", "peft_train_peer", base_path(EMBEDDED)))
        users = stack.enter_context(owners(running, JOBS))
        one, together = OneJob(running, peft), Together(running, users, peft)
        beside, news, more = Beside(running), [], []
        for turn in range(ROUNDS + 1):  # one to warm up
            for contender in (one, together, beside):
                contender.measure(keep=turn > 0)
            news.append(ten_examples(users[0], 2 * turn))
            more.append(ten_examples(users[0], 2 * turn + 1, model=NEWS))
        fresh = Figure.of("ten new examples to the first answer", "s", news[1:], "goal: under 20")
        appended = Figure.of("ten more, on top of the last version", "s", more[1:], "goal: under 20")
        return [*one.figures(), *together.figures(), *beside.figures(), fresh, appended]


# -- contenders


@dataclass
class OneJob:
    """A job alone, and the same with PEFT."""

    running: Server
    peft: PeerProcess | None
    rates: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    peer_rates: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.data = data(0, EXAMPLES, LENGTH, PROMPT)

    def measure(self, *, keep: bool) -> None:
        with endless_job(self.running, self.data.lines, **STEADY):
            time.sleep(WARM_SECONDS)
            rate = trained_while(self.running, lambda: time.sleep(SECONDS))
            share = training(self.running)["share"]
        peer_rate = None
        if self.peft is not None:
            time.sleep(SETTLE_SECONDS)
            steps = max(3, round(rate * SECONDS / (BATCH * LENGTH)))
            seconds = self.peft.train(self.data.tokens, PROMPT, BATCH, steps).steps[1:]
            peer_rate = BATCH * LENGTH * len(seconds) / sum(seconds)
            time.sleep(SETTLE_SECONDS)
        if keep:
            self.rates.append(rate)
            self.shares.append(100 * share)
            self.peer_rates += [] if peer_rate is None else [peer_rate]

    def figures(self) -> list[Figure]:
        name = f"one job, {BATCH} x {LENGTH} tokens a step"
        note = _times(statistics.median(self.rates), self.peer_rates, "goal: 1.3x")
        figures = [Figure.of(name, "tok/s", self.rates, note)]
        figures += [Figure.of(f"PEFT: {name}", "tok/s", self.peer_rates)] if self.peer_rates else []
        return [*figures, Figure.of("one job, nobody asking: share of the time", "%", self.shares, "goal: 95")]


@dataclass
class Together:
    """Small jobs of as many owners, all at once, and with PEFT one after the other."""

    running: Server
    users: list[Server]
    peft: PeerProcess | None
    rates: list[float] = field(default_factory=list)
    peer_rates: list[float] = field(default_factory=list)
    grown: list[float] = field(default_factory=list)  # MiB

    def __post_init__(self) -> None:
        self.data = [data(1 + job, SMALL_EXAMPLES, SMALL_LENGTH, PROMPT) for job in range(JOBS)]
        self.tokens = JOBS * SMALL_STEPS * SMALL_BATCH * SMALL_LENGTH

    def measure(self, *, keep: bool) -> None:
        files = [upload(user, d.lines) for user, d in zip(self.users, self.data, strict=True)]
        before = self.running.resident_mib()
        with highest(self.running.resident_mib) as resident:
            started = time.perf_counter()
            epochs = SMALL_STEPS * SMALL_BATCH // SMALL_EXAMPLES
            asked = {"batch_size": SMALL_BATCH, "n_epochs": epochs, "rank": RANK, "held_out": 0}
            made = [(user, create(user, file, "small", **asked)) for user, file in zip(self.users, files, strict=True)]
            wait_until_together(self.running, made)
            for user, job in made:
                wait_for(user, job)
            seconds = time.perf_counter() - started
        peer_seconds = None
        if self.peft is not None:
            time.sleep(SETTLE_SECONDS)
            peer_seconds = sum(self.peft.train(d.tokens, PROMPT, SMALL_BATCH, SMALL_STEPS).whole for d in self.data)
            time.sleep(SETTLE_SECONDS)
        if keep:
            self.rates.append(self.tokens / seconds)
            self.grown.append(max(resident) - before)
            self.peer_rates += [] if peer_seconds is None else [self.tokens / peer_seconds]

    def figures(self) -> list[Figure]:
        name = f"{JOBS} jobs of {SMALL_STEPS} steps of {SMALL_BATCH} x {SMALL_LENGTH} tokens"
        note = _times(statistics.median(self.rates), self.peer_rates, "goal: 2x")
        figures = [Figure.of(f"{name}, at once", "tok/s", self.rates, note)]
        if self.peer_rates:
            figures.append(Figure.of(f"PEFT: {name}, one after the other", "tok/s", self.peer_rates))
        # of each parameter: itself, its gradient and AdamW's two moments in fp32, and two copies in bf16: one that is
        # used, and one that is being published
        own = JOBS * chosen(()).numel(RANK) * (4 * 4 + 2 * 2) / MIB
        return [
            *figures,
            Figure.of(f"memory of {JOBS} jobs at once", "MiB", self.grown, f"goal: under {own + SHARED_MIB:.0f}"),
        ]


@dataclass
class Beside:
    """A job and streams, each alone and then together."""

    running: Server
    rates: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    idle: list[tuple[float, float]] = field(default_factory=list)  # ms between tokens: median, and 95th percentile
    busy: list[tuple[float, float]] = field(default_factory=list)
    spoken: list[tuple[float, float]] = field(default_factory=list)  # tokens per second of the streams: idle, busy

    def __post_init__(self) -> None:
        self.models = [a["model"] for a in import_adapters(self.running, STREAMS)]
        self.lines = data(0, EXAMPLES, LENGTH, PROMPT).lines

    def measure(self, *, keep: bool) -> None:
        idle = self._stream()
        with endless_job(self.running, self.lines, **STEADY):
            time.sleep(WARM_SECONDS)
            alone = trained_while(self.running, lambda: time.sleep(SECONDS))
            self._stream(WARM_SECONDS)
            busy: list[Streamed] = []
            rate = trained_while(self.running, lambda: busy.append(self._stream()))
        if keep:
            self.alone.append(alone)
            self.rates.append(rate)
            self.idle.append(idle.gaps)
            self.busy.append(busy[0].gaps)
            self.spoken.append((idle.rate, busy[0].rate))

    def _stream(self, seconds: float = SECONDS) -> Streamed:
        """Streams that ask again as soon as they are answered, for at least that long."""
        load, answers = Load(self.running.url, self.running.key), list[Answer]()
        started = time.perf_counter()

        async def run() -> None:
            async with load.connect() as client:

                async def stream(model: str) -> None:
                    while time.perf_counter() - started < seconds:
                        answers.append(await complete(client, model, TOKENS))

                await asyncio.gather(*map(stream, self.models))

        asyncio.run(run())
        rate = sum(a.tokens for a in answers) / (time.perf_counter() - started)
        gaps = sorted(gap * 1e3 for a in answers for gap in a.gaps)
        return Streamed((gaps[len(gaps) // 2], gaps[int(0.95 * len(gaps))]), rate)

    def figures(self) -> list[Figure]:
        kept = [100 * both / alone for both, alone in zip(self.rates, self.alone, strict=True)]
        longer = [busy[1] / idle[1] for busy, idle in zip(self.busy, self.idle, strict=True)]
        name = f"{STREAMS} streams"
        figures = []
        for part, which in enumerate(("median", "p95")):
            for state, seen in (("no training", self.idle), ("training", self.busy)):
                figures.append(Figure.of(f"{name}, {state}: between tokens, {which}", "ms", [g[part] for g in seen]))
        for state, spoken in zip(("no training", "training"), zip(*self.spoken, strict=True), strict=True):
            figures.append(Figure.of(f"{name}, {state}", "tok/s", spoken))
        return [
            *figures,
            Figure.of(f"{name}: p95 with training over without", "x", longer, "goal: at most 1.3"),
            Figure.of(f"training beside {name}", "tok/s", self.rates),
            Figure.of("that, of what it gets alone", "%", kept, "goal: 50"),
        ]


class Streamed(NamedTuple):
    gaps: tuple[float, float]  # milliseconds: median, and 95th percentile
    rate: float


def ten_examples(running: Server, turn: int, *, model: str | None = None) -> float:
    """Seconds from the upload until the model that learned them, going on from `model`, has answered."""
    line = '{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": "%s"}]}'
    lines = "\n".join(line % (f"What is item {turn * 10 + i} called?", f"It is called crate {i}.") for i in range(10))
    started = time.perf_counter()
    job = create(running, upload(running, lines.encode()), NEWS.partition("/")[2], model=model)
    Load(running.url, running.key).one(wait_for(running, job)["fine_tuned_model"], 1, "What")
    return time.perf_counter() - started


# -- helpers


@contextmanager
def highest(look: Callable[[], float]) -> Iterator[list[float]]:
    """What `look` says, again and again while the block runs."""
    seen, over = [look()], threading.Event()

    def watch() -> None:
        while not over.wait(POLL_SECONDS):
            seen.append(look())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def _times(own: float, theirs: list[float], goal: str) -> str:
    return f"{own / statistics.median(theirs):.2f}x PEFT; {goal}" if theirs else goal
