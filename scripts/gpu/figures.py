"""Figures of the engine on a device: cold boot, decode and training on a random base, beside PEFT and the limits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from figure import Figure
from peft import LoraConfig, get_peft_model
from transformers.generation.streamers import BaseStreamer

from adapterhub.config import format_bytes
from adapterhub.swap.ref import AdapterRef, Tier
from gpu.clock import Clock
from gpu.kernels import ROWS, bytes_of_step, step_figures
from gpu.limits import Limits
from gpu.stage import LLAMA, QUICK, QWEN, RANK, First, Served, Sizes, Stage, release
from gpu.training import training

CONTEXT = 512
PEFT_ROWS = 8
ROUNDS = 2  # of answers whose steps are measured, after one to warm up
_BOOTS = 4  # that are not left out


def shapes(quick: bool) -> tuple[Sizes, ...]:
    """Whose shapes are measured, in order."""
    return (QUICK,) if quick else (QWEN, LLAMA)


def measure(stage: Stage, limits: Limits, clock: Clock) -> Iterator[tuple[str, Callable[[], list[Figure]]]]:
    """Each section's title, and what measures it."""
    yield f"Cold boot ({stage})", partial(cold_boot, stage, limits, clock)
    yield f"Decode ({stage})", partial(decode, stage, limits, clock)
    if stage.device.type == "cuda":
        title = f"Forward of one decode step at {CONTEXT} tokens of context ({stage})"
        yield title, partial(step_figures, stage.base, limits, CONTEXT)
    yield f"Training ({stage})", partial(training, stage, limits, clock)


def cold_boot(stage: Stage, limits: Limits, clock: Clock) -> list[Figure]:
    """One adapter at a time: never read before, then from RAM, then from its file again, each followed by a request
    that finds it on the device. Files are in the system's page cache, having just been written."""
    found: dict[str, list[tuple[First, First]]] = {"disk, first read": [], "RAM": [], "disk, read again": []}
    refs = stage.refs[: stage.sizes.boots]
    with stage.serving(adapters=2) as served:
        locked = served.page_locked()
        served.steps([stage.refs[-1]])  # to warm up, with one that is not measured
        for kind, tier in zip(found, (Tier.DISK, Tier.RAM, Tier.DISK), strict=True):
            for i, ref in enumerate(refs):
                if i >= _BOOTS and not clock.may(f"some cold boots, {stage.sizes.name}"):
                    break
                found[kind].append(_boot(served, ref, tier, kind))
            refs = refs[: len(found[kind])]  # what follows needs to have been read
    least = refs[0].nbytes / limits.upload * 1e3
    limit = f"its {format_bytes(refs[0].nbytes)} at the host-to-device rate: {least:.3g} ms"
    if not locked:
        limit += "; RAM was not page-locked"
    figures = []
    for kind, pairs in found.items():
        loads = [cold.origin.load_ms for cold, _ in pairs]
        added = [(cold.seconds - warm.seconds) * 1e3 for cold, warm in pairs]
        for title, times in ((f"load from {kind}", loads), (f"added to the first token, {kind}", added)):
            ratio = f"{limit}; {statistics.median(times) / least:.2f} times that"
            figures.append(Figure.of(title, "ms", times, ratio))
        figures.append(Figure.of(f"first token, cold from {kind}", "ms", [c.seconds * 1e3 for c, _ in pairs]))
    warm = [warm.seconds * 1e3 for pairs in found.values() for _, warm in pairs]
    return [*figures, Figure.of("first token, adapter on the device", "ms", warm)]


def _boot(served: Served, ref: AdapterRef, tier: Tier, kind: str) -> tuple[First, First]:
    if kind == "disk, read again":
        served.engine.evict(ref.digest).result(60)
    return served.first_token(ref, tier), served.first_token(ref, Tier.DEVICE)


def decode(stage: Stage, limits: Limits, clock: Clock) -> list[Figure]:
    """Milliseconds of one step, in which every row gets a token."""
    figures, different = [], 0.0
    with stage.serving(adapters=max(ROWS)) as served:
        for rows in ROWS:
            alone = 0.0
            for kind, refs in (
                ("base", [None] * rows),
                ("one adapter", [stage.refs[0]] * rows),
                ("all different", stage.refs[:rows]),
            ):
                if kind == "one adapter" and not clock.may(f"decode with one adapter, {stage.sizes.name}"):
                    continue
                served.steps(refs)
                steps = [s * 1e3 for s in served.steps(refs)]
                if clock.may(f"more rounds of decode, {stage.sizes.name}"):
                    steps += [s * 1e3 for _ in range(1, ROUNDS) for s in served.steps(refs)]
                median = statistics.median(steps)
                alone = alone or median
                if rows == PEFT_ROWS:
                    different = median
                distinct = len({ref for ref in refs if ref is not None})
                least = (bytes_of_step(stage.base) + distinct * stage.refs[0].nbytes) / limits.copy * 1e3
                note = f"{median / alone:.2f} times base; {least:.3g} ms to read base and adapters"
                figures.append(Figure.of(f"{rows}-row step, {kind}", "ms", steps, note))
    times = peft_steps(stage, clock)
    release(stage.device)
    note = f"{statistics.median(times) / different:.1f} times ours, all different"
    return [*figures, Figure.of(f"PEFT: {PEFT_ROWS}-row step, all different", "ms", times, note)]


class Steps(BaseStreamer):
    """Notes when `generate` hands over the prompt, and then each step's tokens."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def peft_steps(stage: Stage, clock: Clock) -> list[float]:
    """Milliseconds of each step of PEFT's mixed batch: `adapter_names` in `generate`."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights=False)
    names = [f"{i}" for i in range(PEFT_ROWS)]
    with stage.device:
        model: Any = get_peft_model(stage.plain(), config, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
    model.to(torch.bfloat16).eval()
    ids = torch.tensor([stage.prompt(stage.sizes.prompt) for _ in names], device=stage.device)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    steps: list[float] = []
    for turn in range(ROUNDS + 1):
        if turn > 1 and not clock.may(f"more rounds of PEFT, {stage.sizes.name}"):
            break
        streamer = Steps()
        with torch.no_grad():
            model.generate(ids, max_new_tokens=stage.sizes.answer, adapter_names=names, streamer=streamer, **options)
        steps += [(later - sooner) * 1e3 for sooner, later in pairwise(streamer.times[1:])]
    return steps[stage.sizes.answer - 1 :]
