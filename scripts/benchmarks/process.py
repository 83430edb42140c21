"""A peer that is a library, in a process of its own: orders go in and answers come out as lines of JSON.

An order is {"load": path of a PEFT directory}, answered by the seconds that took; {"unload": null}, of the one loaded
last; or {"prompt": token ids, "adapters": [number in the order of loading, or null for the base], "tokens": how many
each}, answered by [seconds to the first token, seconds to the last] for each, from when the order came. A library that
trains gets {"train": lists of token ids, "prompt": how many of each are not learned, "batch": examples of a step,
"steps": how many}, answered by [the seconds that it all took, a list of those that each step took].
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from benchmarks.load import Answer, Asked, Round

_SHOWN = 4000  # characters of what a failed peer printed


class Times(NamedTuple):
    """Of one answer, in seconds."""

    first: float
    whole: float


class Training(NamedTuple):
    """In seconds."""

    whole: float  # from the base to a saved adapter
    steps: list[float]


class PeerProcess:
    """The asking side."""

    def __init__(self, name: str, process: subprocess.Popen[str], log: IO[str]) -> None:
        self.name = name
        self._process = process
        self._log = log

    def load(self, path: Path) -> float:
        """Seconds that one more adapter took to load."""
        return self._order({"load": str(path)})

    def unload(self) -> None:
        self._order({"unload": None})

    def ask(self, adapters: Sequence[int | None], tokens: int, prompt: list[int]) -> Round:
        times = self._order({"prompt": prompt, "adapters": list(adapters), "tokens": tokens})
        answers = [Answer(first, whole, tokens) for first, whole in times]
        return Round(answers, max(a.whole for a in answers))

    def follow(self, adapters: Sequence[int], asked: Sequence[Asked]) -> list[Answer]:
        """One after the other; who comes meanwhile waits."""
        free, answers = 0.0, []
        for adapter, one in zip(adapters, asked, strict=True):
            [alone] = self.ask([adapter], one.answer, one.prompt).answers
            waited = max(free - one.at, 0.0)
            answers.append(Answer(waited + alone.first, waited + alone.whole, one.answer))
            free = one.at + waited + alone.whole
        return answers

    def train(self, examples: list[list[int]], prompt: int, batch: int, steps: int) -> Training:
        return Training(*self._order({"train": examples, "prompt": prompt, "batch": batch, "steps": steps}))

    def _order(self, order: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(order), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            self._log.seek(0)
            raise SystemExit(f"the process of {self.name} ended with {status}:\n{self._log.read()[-_SHOWN:]}")
        return json.loads(line)


@contextmanager
def peer_process(name: str, module: str, model: str) -> Iterator[PeerProcess]:
    """Runs a module of this package on a model; it ends when the block does."""
    # not by its path: another module beside it has the name of one of Python's own
    command = [sys.executable, "-m", f"benchmarks.{module}", model]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=env) as process,
    ):
        try:
            yield PeerProcess(name, process, log)
        finally:
            process.kill()


class Library:
    """The answering side: what a peer's script does with each order."""

    def load(self, path: str) -> float:
        raise NotImplementedError

    def unload(self) -> None:
        raise NotImplementedError

    def ask(self, prompt: list[int], adapters: list[int | None], tokens: int) -> list[Times]:
        raise NotImplementedError

    def train(self, examples: list[list[int]], prompt: int, batch: int, steps: int) -> Training:
        raise NotImplementedError


def answer_orders(start: Callable[[str], Library]) -> None:
    """Takes orders from stdin until it is closed. What the library itself prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    library = start(sys.argv[1])
    for line in sys.stdin:
        order = json.loads(line)
        result: Any = None
        if "load" in order:
            result = library.load(order["load"])
        elif "unload" in order:
            library.unload()
        elif "train" in order:
            result = library.train(order["train"], order["prompt"], order["batch"], order["steps"])
        else:
            result = library.ask(order["prompt"], order["adapters"], order["tokens"])
        print(json.dumps(result), file=answers, flush=True)
