"""Figures of the engine on a device: cold boot, decode and training on a random base, beside PEFT and the limits."""

from __future__ import annotations

import copy
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from figure import Figure
from peft import LoraConfig, get_peft_model
from random_blocks import random_block
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config
from transformers.generation.streamers import BaseStreamer

from adapterhub.base.engine import Engine
from adapterhub.base.model import Base, prepare_base
from adapterhub.base.request import Origin, Output, Request, Sampling
from adapterhub.config import MIB, Config, format_bytes
from adapterhub.swap.allocator import aligned
from adapterhub.swap.block import write_block
from adapterhub.swap.ref import AdapterRef, Tier
from adapterhub.train.cotrainer import CoTrainer
from adapterhub.train.news import News, Progress, Trained
from adapterhub.train.plan import make_plan
from adapterhub.train.run import Run
from gpu.limits import Limits, seconds
from tests.tiny import to_learn

RANK = 16  # on all linears
SIZE = 0.02  # of a random adapter's numbers
ROWS = (1, 8, 32)
PEFT_ROWS = 8
ROUNDS = 2  # of answers whose steps are measured, after one to warm up
BATCH = 4  # examples of a training step


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how often."""

    base: Qwen2Config
    prompt: int  # tokens
    answer: int
    boots: int  # adapters that are loaded one after the other
    example: int  # tokens of a training example
    steps: int  # of training


FULL = Sizes(
    # Qwen2.5-0.5B
    Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    ),
    prompt=32,
    answer=64,
    boots=12,
    example=256,
    steps=12,
)
QUICK = Sizes(
    Qwen2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    ),
    prompt=16,
    answer=8,
    boots=4,
    example=32,
    steps=4,
)


class First(NamedTuple):
    """Seconds from a request to its first token, and where its adapter came from."""

    seconds: float
    origin: Origin


class Stage:
    """The base on its device, adapters on disk, and a copy of the same base for PEFT."""

    def __init__(self, device: torch.device, sizes: Sizes, directory: Path) -> None:
        self.device, self.sizes, self.directory = device, sizes, directory
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(sizes.base, dtype=torch.bfloat16).eval()
        self.plain: PreTrainedModel = copy.deepcopy(model).requires_grad_(False).to(device)
        self.base: Base = prepare_base("random", model, None, device)
        (directory / "blobs").mkdir()
        self.refs = [self._store(seed) for seed in range(max(*ROWS, sizes.boots))]
        self._choose = random.Random(0)

    def _store(self, seed: int) -> AdapterRef:
        block = random_block(self.base, self.base.layout, RANK, seed, SIZE)
        write_block(block, self.directory / "blobs")
        return AdapterRef(f"{seed}", block.digest, block.meta.nbytes)

    def prompt(self, tokens: int) -> list[int]:
        """A new one each time, so that no beginning is found in the KV cache."""
        return [self._choose.randrange(self.sizes.base.vocab_size) for _ in range(tokens)]

    @contextmanager
    def serving(self, adapters: int) -> Iterator[Served]:
        """A started engine whose pool holds that many adapters; there is RAM for all."""
        nbytes = aligned(self.refs[0].nbytes)
        served = Served(
            self,
            Config(
                data_dir=self.directory,
                device_bytes=adapters * nbytes,
                ram_bytes=2 * len(self.refs) * nbytes,  # pinned memory comes in powers of two
                kv_bytes=64 * MIB if self.sizes is QUICK else 2048 * MIB,
            ),
        )
        served.engine.start()
        try:
            yield served
            served.engine.check_integrity().result(60)
        finally:
            served.engine.stop()


class Served:
    """A running engine, and when it said what."""

    def __init__(self, stage: Stage, config: Config) -> None:
        self._stage = stage
        self._heard: SimpleQueue[tuple[float, list[Output]]] = SimpleQueue()
        self._asked = 0
        self.engine = Engine(stage.base, config, lambda outputs: self._heard.put((time.perf_counter(), outputs)))

    def first_token(self, ref: AdapterRef, expected: Tier) -> First:
        started = time.perf_counter()
        self._submit(ref, 1)
        at, [output] = self._hear()
        assert output.origin is not None
        if output.origin.tier is not expected:
            raise RuntimeError(f"the adapter was found in {output.origin.tier}, not in {expected}")
        return First(at - started, output.origin)

    def steps(self, refs: Sequence[AdapterRef | None]) -> list[float]:
        """Seconds of each step in which all of the requests, one for each of `refs`, got a token."""
        for ref in refs:
            self._submit(ref, self._stage.sizes.answer)
        times, running = [], len(refs)
        while running:
            at, outputs = self._hear()
            running -= sum(output.last for output in outputs)
            times.append((at, len(outputs)))
        full = [at for at, count in times if count == len(refs)]
        return [later - sooner for sooner, later in pairwise(full)]

    def _submit(self, ref: AdapterRef | None, tokens: int) -> None:
        self._asked += 1
        sampling = Sampling(temperature=0.0, max_tokens=tokens)
        self.engine.submit(Request(f"{self._asked}", self._stage.prompt(self._stage.sizes.prompt), sampling, ref))

    def _hear(self) -> tuple[float, list[Output]]:
        at, outputs = self._heard.get(timeout=120)
        for output in outputs:
            if output.error is not None:
                raise output.error
        return at, outputs


def measure(device: torch.device, limits: Limits, quick: bool) -> Iterator[tuple[str, Callable[[], list[Figure]]]]:
    """Each section's title, and what measures it."""
    with tempfile.TemporaryDirectory() as directory:
        stage = Stage(device, QUICK if quick else FULL, Path(directory))
        size = f"base of {format_bytes(stage.base.nbytes)}, adapters of rank {RANK} on all linears"
        yield f"Cold boot ({size})", lambda: cold_boot(stage, limits)
        yield f"Decode ({size})", lambda: decode(stage, limits)
        yield f"Training ({size})", lambda: training(stage)


def cold_boot(stage: Stage, limits: Limits) -> list[Figure]:
    """One adapter at a time: never read before, then from RAM, then from its file again, each followed by a request
    that finds it on the device. Files are in the system's page cache, having just been written."""
    refs = stage.refs[: stage.sizes.boots]
    found: dict[str, list[tuple[First, First]]] = {"disk, first read": [], "RAM": [], "disk, read again": []}
    with stage.serving(adapters=2) as served:
        served.steps([stage.refs[-1]])  # to warm up, with one that is not measured
        for kind, tier in zip(found, (Tier.DISK, Tier.RAM, Tier.DISK), strict=True):
            for ref in refs:
                if kind == "disk, read again":
                    served.engine.evict(ref.digest).result(60)
                found[kind].append((served.first_token(ref, tier), served.first_token(ref, Tier.DEVICE)))
    least = refs[0].nbytes / limits.upload * 1e3
    limit = f"its {format_bytes(refs[0].nbytes)} at the host-to-device rate: {least:.3g} ms"
    figures = []
    for kind, pairs in found.items():
        loads = [cold.origin.load_ms for cold, _ in pairs]
        added = [(cold.seconds - warm.seconds) * 1e3 for cold, warm in pairs]
        figures.append(Figure.of(f"load from {kind}", "ms", loads, limit))
        figures.append(Figure.of(f"first token, cold from {kind}", "ms", [c.seconds * 1e3 for c, _ in pairs]))
        figures.append(Figure.of(f"added to the first token, {kind}", "ms", added, limit))
    warm = [warm.seconds * 1e3 for pairs in found.values() for _, warm in pairs]
    return [*figures, Figure.of("first token, adapter on the device", "ms", warm)]


def decode(stage: Stage, limits: Limits) -> list[Figure]:
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
                served.steps(refs)
                steps = [s * 1e3 for _ in range(ROUNDS) for s in served.steps(refs)]
                median = statistics.median(steps)
                alone = alone or median
                if rows == PEFT_ROWS:
                    different = median
                distinct = len({ref for ref in refs if ref is not None})
                least = (stage.base.nbytes + distinct * stage.refs[0].nbytes) / limits.copy * 1e3
                note = f"{median / alone:.2f} times base; {least:.3g} ms to read base and adapters"
                figures.append(Figure.of(f"{rows}-row step, {kind}", "ms", steps, note))
    times = peft_steps(stage)
    note = f"{statistics.median(times) / different:.1f} times ours, all different"
    return [*figures, Figure.of(f"PEFT: {PEFT_ROWS}-row step, all different", "ms", times, note)]


class Clock(BaseStreamer):
    """Notes when `generate` hands over the prompt, and then each step's tokens."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def peft_steps(stage: Stage) -> list[float]:
    """Milliseconds of each step of PEFT's mixed batch: `adapter_names` in `generate`."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights=False)
    names = [f"{i}" for i in range(PEFT_ROWS)]
    model: Any = get_peft_model(copy.deepcopy(stage.plain), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.to(torch.bfloat16).eval()
    ids = torch.tensor([stage.prompt(stage.sizes.prompt) for _ in names], device=stage.device)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    steps: list[float] = []
    for _ in range(ROUNDS + 1):
        clock = Clock()
        with torch.no_grad():
            model.generate(ids, max_new_tokens=stage.sizes.answer, adapter_names=names, streamer=clock, **options)
        steps += [(later - sooner) * 1e3 for sooner, later in pairwise(clock.times[1:])]
    return steps[stage.sizes.answer - 1 :]


def training(stage: Stage) -> list[Figure]:
    """Tokens per second of whole optimizer steps, of 4 examples each."""
    length, whole = stage.sizes.example, BATCH * stage.sizes.example
    texts = [stage.prompt(length) for _ in range(BATCH)]
    figures = []
    for micro in (length, whole):
        rates = _train(stage, texts, micro)
        figures.append(Figure.of(f"training in micro-steps of {micro} tokens", "tok/s", rates))
    rates = [whole / s for s in seconds(stage.device, peft_step(stage, texts), stage.sizes.steps)]
    note = f"ours is {figures[-1].median / statistics.median(rates):.2f} times that"
    return [*figures, Figure.of(f"PEFT: training in batches of {whole} tokens", "tok/s", rates, note)]


class Pieces(CoTrainer):
    """With pieces of a given size, whatever the engine would give it."""

    def __init__(self, base: Base, wake: Callable[[], None], tokens: int) -> None:
        super().__init__(base, wake)
        self._tokens = tokens

    def step(self, tokens: int, give_way: Callable[[], None] = lambda: None) -> int:
        return super().step(self._tokens, give_way)


def _train(stage: Stage, texts: list[list[int]], micro: int) -> list[float]:
    """Tokens per second of each step but the first two, of a job that the engine runs with nobody asking."""
    heard: SimpleQueue[tuple[float, News]] = SimpleQueue()
    asked_for = {"n_epochs": stage.sizes.steps + 2, "batch_size": BATCH, "rank": RANK, "keep_checkpoints": 0}
    plan = make_plan(asked_for, 0, BATCH, stage.base.layout)
    job = Run(stage.base, plan, to_learn(texts), None, lambda news: heard.put((time.perf_counter(), news)))
    times = []
    with stage.serving(adapters=1) as served:
        trainer = Pieces(stage.base, served.engine.wake, micro)
        served.engine.set_idle_work(trainer)
        trainer.add(job)
        while True:
            at, news = heard.get(timeout=120)
            if isinstance(news, Exception):
                raise news
            if isinstance(news, Trained):
                break
            if isinstance(news, Progress):
                times.append(at)
    tokens = sum(map(len, texts))
    return [tokens / (later - sooner) for sooner, later in pairwise(times[1:])]


def peft_step(stage: Stage, texts: list[list[int]]) -> Callable[[], None]:
    """The same by PEFT, as transformers' trainer does it: factors in fp32, products in bf16 by autocast."""
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(copy.deepcopy(stage.plain), config).train()
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
