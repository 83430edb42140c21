"""What following grammars costs: a step of 16 rows in one engine on the embedded base, without grammars, with a JSON
schema for each, and with tools that may be called; and what of it computing the masks and using them takes."""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from figure import Figure

from adapterhub.api.structured import ResponseFormat, answer_part
from adapterhub.api.tools import FunctionTool, Toolbox
from adapterhub.base.engine import Engine
from adapterhub.base.grammar import Grammar, Grammars, Part, masks
from adapterhub.base.model import Base, load_base
from adapterhub.base.request import Output, Request, Sampling
from adapterhub.base.sampler import sample
from adapterhub.base.scheduler import Sequence
from adapterhub.config import Config
from benchmarks.peers import Setting, prompt_ids

ROWS = 16
TOKENS = 100
ROUNDS = 5
_PEOPLE = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "likes": {"type": "string"}},
        "required": ["name", "age", "likes"],
        "additionalProperties": False,
    },
    "minItems": 200,
}
_SCHEMA = ResponseFormat.model_validate({"type": "json_schema", "json_schema": {"name": "people", "schema": _PEOPLE}})
_TOOL = {"type": "function", "function": {"name": "add", "parameters": _PEOPLE["items"]}}


@dataclass
class Steps:
    """When each step of an engine was over."""

    ends: list[float] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    left: int = 0

    def hear(self, outputs: list[Output]) -> None:
        self.ends.append(time.perf_counter())
        self.left -= sum(output.last for output in outputs)
        if self.left == 0:
            self.done.set()


def run(_: Setting) -> list[Figure]:
    with tempfile.TemporaryDirectory() as directory:
        config = Config(data_dir=Path(directory), device="cpu")
        base = load_base(config)
        grammars = Grammars(base.tokenizer, base.end_tokens, base.vocabulary)
        cases = {name: grammars.compile("", parts).result() if parts else None for name, parts in kinds().items()}
        steps = Steps()
        engine = Engine(base, config, steps.hear)
        engine.start()
        times: dict[str, list[float]] = {name: [] for name in cases}
        for _round in range(ROUNDS):
            for name, grammar in cases.items():
                times[name].append(step_ms(engine, steps, grammar))
        engine.stop()
        grammars.close()
    plain = statistics.median(times["no grammar"])
    figures = [
        Figure.of(f"step of {ROWS} rows, {name}", "ms", values, f"{statistics.median(values) - plain:+.2f} ms")
        for name, values in times.items()
    ]
    schema = cases["a JSON schema each"]
    assert schema is not None
    return [*figures, *parts_of_a_step(base, schema)]


def kinds() -> dict[str, list[Part]]:
    schema = answer_part(_SCHEMA)
    assert schema is not None
    toolbox = Toolbox([FunctionTool.model_validate(_TOOL)], "auto", None)
    return {
        "no grammar": [],
        "a JSON schema each": [schema],
        "tools, in words": toolbox.grammar(None),
    }


def step_ms(engine: Engine, steps: Steps, grammar: Grammar | None) -> float:
    """The median time between two steps in which all rows decode."""
    steps.ends.clear()
    steps.done.clear()
    steps.left = ROWS
    for row in range(ROWS):
        sampling = Sampling(temperature=1.0, seed=row, max_tokens=TOKENS, min_tokens=TOKENS)
        engine.submit(Request(f"{row}", prompt_ids()[:32], sampling, grammar=grammar))
    steps.done.wait()
    ends = steps.ends[TOKENS // 4 : TOKENS]
    return statistics.median(b - a for a, b in pairwise(ends)) * 1e3


def parts_of_a_step(base: Base, grammar: Grammar) -> list[Figure]:
    """The masks of all rows; choosing tokens with them and without; and following one token, for one row."""
    logits = torch.randn(ROWS, base.vocabulary)
    sampling = Sampling(temperature=1.0, seed=1)
    plain = [Sequence.of(Request("", [1], sampling)) for _ in range(ROWS)]
    guided = [Sequence.of(Request("", [1], sampling, grammar=grammar)) for _ in range(ROWS)]
    matchers = [matcher for s in guided if (matcher := s.matcher) is not None]
    found: dict[str, list[float]] = {"masks": [], "choosing without": [], "choosing with": [], "following": []}
    for _ in range(50):
        begun = time.perf_counter()
        masks(matchers)
        found["masks"].append(time.perf_counter() - begun)
        for name, rows in (("choosing without", plain), ("choosing with", guided)):
            mine = logits.clone()
            begun = time.perf_counter()
            tokens = sample(mine, rows, base.end_tokens)
            found[name].append(time.perf_counter() - begun)
        for matcher, token in zip(matchers, tokens, strict=True):
            assert token is not None
            begun = time.perf_counter()
            matcher.accept(token.id)
            found["following"].append(time.perf_counter() - begun)
    names = {"following": "following a token, one row"}
    return [
        Figure.of(names.get(name, f"{name}, {ROWS} rows"), "us", [v * 1e6 for v in values])
        for name, values in found.items()
    ]
