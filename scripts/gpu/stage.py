"""A random base on a device, adapters for it on disk, and an engine that serves them: what figures are measured on."""

from __future__ import annotations

import copy
import gc
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple, TypeVar

import torch
from random_blocks import random_block
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from adapterhub.base.engine import Engine
from adapterhub.base.model import Base, prepare_base
from adapterhub.base.request import Origin, Output, Request, Sampling
from adapterhub.config import MIB, Config, format_bytes
from adapterhub.swap.allocator import aligned
from adapterhub.swap.block import write_block
from adapterhub.swap.ref import AdapterRef, Tier
from gpu.kernels import ROWS

RANK = 16  # on all linears
SIZE = 0.02  # of a random adapter's numbers
_WRITERS = 4  # threads that write blocks
_LOCKS_WITHIN = 10.0  # seconds
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how often."""

    name: str  # whose shape it is
    base: PreTrainedConfig
    prompt: int  # tokens
    answer: int
    boots: int  # adapters that are loaded one after the other
    example: int  # tokens of a training example
    steps: int  # of training
    pieces: tuple[int, ...]  # tokens of a piece in which several jobs train together


QWEN = Sizes(
    "Qwen2.5-0.5B",
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
    answer=48,
    boots=12,
    example=256,
    steps=8,
    pieces=(1024, 4096),
)
LLAMA = Sizes(
    "Llama-3.1-8B",
    LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
    ),
    prompt=32,
    answer=32,
    boots=8,
    example=256,
    steps=6,
    pieces=(1024, 2048),
)
QUICK = Sizes(
    "a tiny model",
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
    steps=3,
    pieces=(128,),
)


class First(NamedTuple):
    """Seconds from a request to its first token, and where its adapter came from."""

    seconds: float
    origin: Origin


class Stage:
    """The base on its device, and adapters on disk."""

    def __init__(self, device: torch.device, sizes: Sizes, directory: Path) -> None:
        self.device, self.sizes, self.directory = device, sizes, directory
        torch.manual_seed(0)
        with device:  # numbers are drawn where they stay
            model = AutoModelForCausalLM.from_config(sizes.base, dtype=torch.bfloat16).requires_grad_(False).eval()
        self._plain: PreTrainedModel = with_the_same_weights(model)
        self.base: Base = prepare_base("random", model, None, device)
        (directory / "blobs").mkdir()
        with ThreadPoolExecutor(_WRITERS) as writers:
            self.refs = list(writers.map(self._store, range(max(*ROWS, sizes.boots + 1))))
        self._choose = random.Random(0)

    def __str__(self) -> str:
        nbytes = format_bytes(self.base.nbytes)
        return f"{self.sizes.name}'s shape, {nbytes}; adapters of rank {RANK} on all linears"

    def _store(self, seed: int) -> AdapterRef:
        block = random_block(self.base, self.base.layout, RANK, seed, SIZE)
        write_block(block, self.directory / "blobs")
        return AdapterRef(f"{seed}", block.digest, block.meta.nbytes)

    def plain(self) -> PreTrainedModel:
        """The base as transformers has it, to be changed at will, with the very weights of `base`: no copy of them."""
        return with_the_same_weights(self._plain)

    def prompt(self, tokens: int) -> list[int]:
        """A new one each time, so that no beginning is found in the KV cache."""
        return [self._choose.randrange(self.sizes.base.vocab_size) for _ in range(tokens)]

    @contextmanager
    def serving(self, adapters: int) -> Iterator[Served]:
        """A started engine whose pool holds that many adapters; there is RAM for those that boot."""
        nbytes = aligned(self.refs[0].nbytes)
        served = Served(
            self,
            Config(
                data_dir=self.directory,
                device_bytes=adapters * nbytes,
                max_batch=max(ROWS),
                ram_bytes=(self.sizes.boots + 1) * nbytes,
                kv_bytes=64 * MIB if self.sizes is QUICK else 2048 * MIB,
            ),
        )
        served.engine.start()
        try:
            yield served
            served.engine.check_integrity().result(60)
        finally:
            served.engine.stop()
            del served
            release(self.device)


@contextmanager
def staged(device: torch.device, sizes: Sizes) -> Iterator[Stage]:
    """On disk, and on the device, only for as long as the block runs."""
    with tempfile.TemporaryDirectory() as directory:
        yield Stage(device, sizes, Path(directory))
    release(device)


def release(device: torch.device) -> None:
    """Gives back what nobody uses any more: models and engines refer to themselves, and go when somebody looks."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def with_the_same_weights(model: Model) -> Model:
    """A copy of the modules around the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


class Served:
    """A running engine, and when it said what."""

    def __init__(self, stage: Stage, config: Config) -> None:
        self._stage = stage
        self._heard: SimpleQueue[tuple[float, list[Output]]] = SimpleQueue()
        self._asked = 0
        self.engine = Engine(stage.base, config, lambda outputs: self._heard.put((time.perf_counter(), outputs)))

    def page_locked(self) -> bool:
        """Waits until a GPU can read the RAM tier by itself; False if it never will."""
        until = time.monotonic() + _LOCKS_WITHIN
        while not (locked := self.engine.tiers.contents.host.is_locked) and time.monotonic() < until:
            time.sleep(0.05)
        return locked

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
