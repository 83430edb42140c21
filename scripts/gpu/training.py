"""Figures of training: tokens per second of whole optimizer steps, one job and several together, beside PEFT."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from queue import SimpleQueue
from typing import Any

import torch
from figure import Figure
from peft import LoraConfig, get_peft_model

from adapterhub.base.model import Base
from adapterhub.train.cotrainer import CoTrainer
from adapterhub.train.news import News, Progress, Trained
from adapterhub.train.plan import make_plan
from adapterhub.train.run import Run
from gpu.clock import Clock
from gpu.limits import Limits, seconds
from gpu.stage import RANK, Stage, release
from tests.tiny import to_learn

BATCH = 4  # examples of an optimizer step
JOBS = 8  # together
_WARM = 2  # steps


def training(stage: Stage, limits: Limits, clock: Clock) -> list[Figure]:
    """Ours, of one job and of several; then PEFT's, which trains one job after the other."""
    length, whole = stage.sizes.example, BATCH * stage.sizes.example
    jobs = [[stage.prompt(length) for _ in range(BATCH)] for _ in range(JOBS)]
    figures = [_figure(stage, limits, jobs[:1], whole)]
    for tokens in stage.sizes.pieces:
        name = f"{JOBS} jobs together, in pieces of {tokens} tokens"
        if tokens == stage.sizes.pieces[0] or clock.may(f"training {name}, {stage.sizes.name}"):
            figures.append(_figure(stage, limits, jobs, tokens))
    step = peft_step(stage, jobs[0])
    rates = [whole / s for s in seconds(stage.device, step, stage.sizes.steps)]
    del step
    release(stage.device)
    peft = statistics.median(rates)
    note = ", ".join(f"{figure.median / peft:.2f}" for figure in figures)
    name = f"PEFT: one job after the other, in batches of {whole} tokens"
    return [*figures, Figure.of(name, "tok/s", rates, f"ours are {note} times that")]


def _figure(stage: Stage, limits: Limits, jobs: list[list[list[int]]], tokens: int) -> Figure:
    many = f"{len(jobs)} jobs together" if len(jobs) > 1 else "one job"
    # forward, and back to what goes into each linear: nothing is to be known of the base's own weights
    products = 4 * sum(t.n_in * t.n_out for t in stage.base.layout.targets)
    head = stage.base.model.get_output_embeddings().weight.numel()
    most = limits.product / (products + 4 * head)
    rates = _train(stage, jobs, tokens)
    return Figure.of(
        f"{many}, in pieces of {tokens} tokens", "tok/s", rates, f"{most:.3g} tok/s at the rate of products"
    )


class Pieces(CoTrainer):
    """With pieces of a given size, whatever the engine would give it."""

    def __init__(self, base: Base, wake: Callable[[], None], tokens: int) -> None:
        super().__init__(base, wake)
        self._tokens = tokens

    def step(self, tokens: int, give_way: Callable[[], None] = lambda: None) -> int:
        return super().step(self._tokens, give_way)


def _train(stage: Stage, jobs: list[list[list[int]]], tokens: int) -> list[float]:
    """Tokens per second of each step that all jobs have made, but for the first, while nobody asks for anything."""
    heard: SimpleQueue[tuple[float, int, News]] = SimpleQueue()
    steps = _WARM + stage.sizes.steps
    asked_for = {"n_epochs": steps, "batch_size": BATCH, "rank": RANK, "keep_checkpoints": 0}
    plan = make_plan(asked_for, 0, BATCH, stage.base.layout, width=stage.base.width)
    done: list[list[float]] = [[] for _ in jobs]  # when each made its steps
    with stage.serving(adapters=1) as served:
        trainer = Pieces(stage.base, served.engine.wake, tokens)
        for i, texts in enumerate(jobs):
            trainer.add(
                Run(stage.base, plan, to_learn(texts), None, lambda n, i=i: heard.put((time.perf_counter(), i, n)))
            )
        served.engine.set_idle_work(trainer)
        ended = 0
        while ended < len(jobs):
            at, i, news = heard.get(timeout=120)
            if isinstance(news, Exception):
                raise news
            if isinstance(news, Progress):
                done[i].append(at)
            ended += isinstance(news, Trained)
    whole = sum(len(text) for texts in jobs for text in texts)
    times = [max(step) for step in zip(*done, strict=True)]
    return [whole / (later - sooner) for sooner, later in pairwise(times[_WARM - 1 :])]


def peft_step(stage: Stage, texts: list[list[int]]) -> Callable[[], None]:
    """The same by PEFT, as transformers' trainer does it: factors in fp32, products in bf16 by autocast."""
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    with stage.device:
        model: Any = get_peft_model(stage.plain(), config).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2e-4, weight_decay=0.0)
    ids = torch.tensor(texts, device=stage.device)

    def step() -> None:
        with torch.autocast(stage.device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step
