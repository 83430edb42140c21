"""Long runs of real code, to find what only time and chance bring out. `scripts/soak engine`, `store`, `openapi` and
`streams` (see soak_store.py and so on) end with status 1 if they found anything.

engine: short requests over many adapters, of which the pool holds a tenth and RAM a fifth; a KV cache in which not all
that run have room; several owners, shared beginnings, seeds, cancelled requests, evicted adapters, training in between,
and memory that runs out at the end of steps and of pieces of training. Every answer is compared with the one that the
same question got alone; pins, extents and KV blocks are counted at intervals; and the process must not grow once a
tenth of the requests are through.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from random_blocks import random_block
from soak_openapi import soak_openapi
from soak_store import soak_store
from soak_streams import soak_streams
from transformers import LlamaConfig

from adapterhub.base.engine import Engine
from adapterhub.base.model import Base
from adapterhub.base.native.model import supports
from adapterhub.base.request import Output, Request, Sampling
from adapterhub.base.scheduler import Work
from adapterhub.config import MIB, Config
from adapterhub.swap.ref import AdapterRef
from adapterhub.train.cotrainer import CoTrainer
from adapterhub.train.news import News, Trained
from adapterhub.train.plan import make_plan
from adapterhub.train.run import Run
from tests.scarce import NO_MEMORY, PLENTY, fail_after
from tests.tiny import GROUPED, kv_bytes, prompt_of, serving_twin, stored, tiny_model, to_learn

SHAPE = {**GROUPED, "hidden_size": 128, "intermediate_size": 96}  # which is trained natively, too
OWNERS = 12
QUESTIONS = 4  # for each adapter
TOKENS = 24  # of the longest answer
IN_POOL, IN_RAM = 0.1, 0.2  # of all adapters
MAX_BATCH = 16
KV_BLOCKS = 12  # a request needs up to 7
ASKED_AT_ONCE = 60
INSPECTIONS = 20
SLACK = 8 * MIB  # that the process may grow in its second half: what the allocator keeps


@dataclass(frozen=True)
class Question:
    """What an owner asks; `sampling` is for the longest answer, of which others are the beginning."""

    prompt: list[int]
    owner: str
    ref: AdapterRef | None
    sampling: Sampling


class Served:
    """A started engine, and what it says."""

    def __init__(self, base: Base, directory: Path, **config: Any) -> None:
        self._heard: SimpleQueue[list[Output]] = SimpleQueue()
        self.engine = Engine(base, Config(data_dir=directory, **config), self._heard.put)
        self.trainer = CoTrainer(base, self.engine.wake)
        self.engine.set_idle_work(self.trainer)

    def submit(self, name: str, question: Question, tokens: int = TOKENS, owner: str | None = None) -> None:
        """Asks for the first `tokens` of the answer."""
        sampling = replace(question.sampling, max_tokens=tokens)
        self.engine.submit(Request(name, question.prompt, sampling, question.ref, owner or question.owner))

    def hear(self) -> list[Output]:
        """The outputs of one step. Fails when there are none for a minute."""
        return self._heard.get(timeout=60)


@contextmanager
def serving(base: Base, directory: Path, **config: Any) -> Iterator[Served]:
    served = Served(base, directory, **config)
    served.engine.start()
    try:
        yield served
        served.engine.check_integrity().result(60)
    finally:
        served.engine.stop()


class Town:
    """A base of the native kind, many adapters of all ranks and targets, and questions to them."""

    def __init__(self, directory: Path, adapters: int, seed: int) -> None:
        choose = random.Random(seed)
        self.directory = directory
        self.base = serving_twin(tiny_model(LlamaConfig(**SHAPE)).bfloat16())
        if not supports(self.base):
            raise SystemExit("the native kernels are off: only they give the same bits alone and among others")
        self.refs = [self._store(choose, number) for number in range(adapters)]
        self.questions = [
            question
            for number, ref in enumerate([None, *self.refs])
            for question in make_questions(choose, ref, f"owner {number % OWNERS}")
        ]

    def _store(self, choose: random.Random, number: int) -> AdapterRef:
        targets = self.base.layout.targets
        some = choose.sample([t.name for t in targets], choose.randint(1, len(targets)))
        block = random_block(self.base, self.base.layout.subset(some), choose.randint(1, 16), number, 0.2)
        return stored(block, self.directory / "blobs")

    def answers_alone(self) -> list[list[int]]:
        """The longest answer to each question, asked with nobody else there and nothing to share."""
        answers: list[list[int]] = []
        with serving(self.base, self.directory, kv_bytes=kv_bytes(self.base, 64)) as served:
            for number, question in enumerate(self.questions):
                served.submit("alone", question, owner=f"{number}")
                heard: list[Output] = []
                while not heard or not heard[-1].last:
                    heard += served.hear()
                answers.append([output.token.id for output in heard if output.token is not None])
        return answers

    @property
    def budgets(self) -> dict[str, int]:
        total = sum(ref.nbytes for ref in self.refs)
        return {
            "device_bytes": max(int(total * IN_POOL), 2 * max(ref.nbytes for ref in self.refs)),
            "ram_bytes": int(total * IN_RAM),
            "kv_bytes": kv_bytes(self.base, KV_BLOCKS),
            "max_batch": MAX_BATCH,
            "max_step_tokens": 48,
        }


def make_questions(choose: random.Random, ref: AdapterRef | None, owner: str) -> Iterator[Question]:
    """Half of them begin as some of everybody's do, half are sampled with a seed."""
    begin = prompt_of(33, choose.randrange(3))
    for number in range(QUESTIONS):
        prompt = prompt_of(choose.randint(1, 40), choose.randrange(2**31))
        seeded = Sampling(temperature=1.0, top_p=0.9, seed=choose.randrange(2**31), max_tokens=TOKENS)
        greedy = Sampling(temperature=0.0, max_tokens=TOKENS)
        yield Question(begin + prompt if number % 2 else prompt, owner, ref, greedy if number < 2 else seeded)


class EngineSoak:
    """Asks, listens and compares, from one thread. What is wrong is kept in `faults`."""

    def __init__(self, town: Town, requests: int, seed: int) -> None:
        self.town, self.requests = town, requests
        self.faults: list[str] = []
        self.counts: Counter[str] = Counter()
        self.resident: list[int] = []  # bytes, at each inspection
        self._choose = random.Random(seed)
        self._room, self._scarcity = PLENTY, random.Random(seed)  # tokens that fit into a step
        self._alone = town.answers_alone()
        self._expected: dict[str, list[int]] = {}  # of what is under way: the tokens that are still to come

    def run(self) -> None:
        with serving(self.town.base, self.town.directory, **self.town.budgets) as served, errors_logged() as errors:
            fail_after(served.engine._serving.runner, self._is_short)
            served.trainer._learn = partial(self._learn, served.trainer._learn)  # type: ignore[method-assign]
            for number in range(self.requests):
                while len(self._expected) >= ASKED_AT_ONCE:
                    self._hear(served)
                self._ask(served, f"{number}")
                if self._choose.random() < 0.05:
                    self._cancel(served)
                if self._choose.random() < 0.05:
                    served.engine.evict(self._choose.choice(self.town.refs).digest)
                if (number + 1) % max(1, self.requests // INSPECTIONS) == 0:
                    self._inspect(served, number + 1)
            self._drain(served)
            stats = served.engine.stats().result(60)
        self.faults += errors
        self.counts["evictions"] = stats["tiers"]["device"]["evictions"]
        self.counts["tokens shared"] = stats["engine"]["shared_tokens"]
        self.counts["steps out of memory"] = stats["engine"]["out_of_memory"]
        self.counts["pieces out of memory"] = stats["engine"]["training"]["out_of_memory"]
        self._check_growth()

    def _is_short(self, work: Sequence[Work]) -> bool:
        """On the engine's thread, after a step."""
        if self._scarcity.random() < 0.01:
            self._room = self._scarcity.choice([1, 4, 20, PLENTY, PLENTY, PLENTY])
        return sum(w.tokens for w in work) > self._room

    def _learn(self, learn: Callable[[Sequence[Any]], None], parts: Sequence[Any]) -> None:
        """On the engine's thread. What is alone in a piece would end its job."""
        learn(parts)
        if sum(len(part.items) for part in parts) > 1 and self._scarcity.random() < 0.05:
            raise torch.OutOfMemoryError(NO_MEMORY)

    def _ask(self, served: Served, name: str) -> None:
        number = self._choose.randrange(len(self.town.questions))
        tokens = self._choose.randint(1, TOKENS)
        self._expected[name] = self._alone[number][:tokens]
        served.submit(name, self.town.questions[number], tokens)

    def _cancel(self, served: Served) -> None:
        name = self._choose.choice(list(self._expected))
        served.engine.cancel(name)
        del self._expected[name]
        self.counts["cancelled"] += 1

    def _hear(self, served: Served) -> None:
        for output in served.hear():
            left = self._expected.get(output.request)
            if left is None:  # it was cancelled while this was on its way
                continue
            right = output.token is not None and left[:1] == [output.token.id]
            if not right:
                self.faults.append(f"request {output.request}: {output.error or output.token} is not {left[:1]}")
            del left[:1]
            if output.last:
                del self._expected[output.request]
                self.counts["answered"] += 1

    def _drain(self, served: Served) -> None:
        while self._expected:
            self._hear(served)

    def _inspect(self, served: Served, number: int) -> None:
        """Counts pins, extents and blocks under load, and again when all is quiet; then lets two jobs begin."""
        served.engine.check_integrity().result(60)
        self._drain(served)
        while served.trainer.running:
            time.sleep(0.01)
        served.engine.check_integrity().result(60)
        served.engine.set_budgets(device=self.town.budgets["device_bytes"]).result(60)  # it has given some of it back
        self.resident.append(resident_bytes())
        print(f"{number:>8} requests, {self.resident[-1] / MIB:.1f} MiB resident", flush=True)
        for seed in (number, number + 1):
            data = to_learn(prompt_of(20, seed + at) for at in range(6))
            plan = make_plan(
                {"n_epochs": 2, "batch_size": 3, "rank": 4},
                seed,
                len(data),
                self.town.base.layout,
                width=self.town.base.width,
            )
            served.trainer.add(Run(self.town.base, plan, data, None, self._note))

    def _note(self, news: News) -> None:
        if isinstance(news, Exception):
            self.faults.append(f"training: {news}")
        self.counts["adapters trained"] += isinstance(news, Trained)

    def _check_growth(self) -> None:
        """A leak grows for as long as it runs; all else has its size when half of the requests were answered."""
        half = INSPECTIONS // 2
        if len(self.resident) > half:
            growth = max(self.resident[half:]) - max(self.resident[:half])
            if growth > SLACK:
                self.faults.append(f"the process grew by {growth / MIB:.1f} MiB in its second half")


@contextmanager
def errors_logged() -> Iterator[list[str]]:
    """What the package logs as an error within the block."""
    found: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: found.append(f"logged: {record.getMessage()}")  # type: ignore[method-assign]
    logger = logging.getLogger("adapterhub")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak_engine(options: argparse.Namespace) -> list[str]:
    """Runs it, prints what happened, and returns what was wrong."""
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        soak = EngineSoak(Town(Path(directory), options.adapters, options.seed), options.requests, options.seed)
        print(f"{len(soak.town.questions)} questions answered alone in {time.perf_counter() - started:.0f} s")
        started = time.perf_counter()
        soak.run()
        counts = ", ".join(f"{count} {what}" for what, count in soak.counts.items())
        print(f"{options.requests} requests in {time.perf_counter() - started:.0f} s: {counts}")
    return soak.faults


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    runs = parser.add_subparsers(required=True)
    engine = runs.add_parser("engine", help="many short requests over many adapters")
    engine.add_argument("--requests", type=int, default=20_000)
    engine.add_argument("--adapters", type=int, default=500)
    engine.add_argument("--seed", type=int, default=0)
    engine.set_defaults(run=soak_engine)
    store = runs.add_parser("store", help="servers that are killed amid imports, deletions and evictions")
    store.add_argument("--kills", type=int, default=100, help="of each of two servers")
    store.add_argument("--seed", type=int, default=0)
    store.set_defaults(run=soak_store)
    openapi = runs.add_parser("openapi", help="requests made up from the OpenAPI document")
    openapi.add_argument("--examples", type=int, default=200, help="of each operation, good and bad ones")
    openapi.add_argument("--seed", type=int, default=1, help="0: the same ones each time")
    openapi.set_defaults(run=soak_openapi)
    streams = runs.add_parser("streams", help="many streams at once, a third of them cut off")
    streams.add_argument("--streams", type=int, default=500, help="at once")
    streams.add_argument("--rounds", type=int, default=10)
    streams.add_argument("--seed", type=int, default=0)
    streams.set_defaults(run=soak_streams)
    options = parser.parse_args(arguments)
    faults = options.run(options)
    for fault in faults[:20]:
        print(f"WRONG  {fault}")
    print(f"{len(faults)} faults" if faults else "No fault was found")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
