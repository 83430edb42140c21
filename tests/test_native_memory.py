"""Native code that gets no memory says so, holds nobody up, and works again once there is some."""

from __future__ import annotations

import ctypes
import multiprocessing
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from adapterhub.base.kv import KVCache
from adapterhub.base.model import prepare_base
from adapterhub.base.native import Isa, best_isa, library
from adapterhub.base.native.decoder import NativeDecoder
from adapterhub.base.native.learner import can_learn
from adapterhub.train.packing import Forward
from tests.kernels import batch
from tests.test_learner import item
from tests.tiny import CPU, SHAPE, tiny_model

pytestmark = pytest.mark.skipif(library() is None, reason="needs a C++ compiler")
_M_MMAP_THRESHOLD = -3
TOLD = "There is no memory left for the native code to work in"


def starved(name: str, action: Callable[[], Any]) -> str:
    """What `action` meets when that native function gets no memory of the system."""
    built = library()
    function = getattr(built, name)

    def call(*arguments: Any) -> Any:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        used = int(status["VmData"].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (used, resource.RLIM_INFINITY))
        try:
            return function(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    setattr(built, name, call)
    try:
        action()
    except torch.OutOfMemoryError as error:
        return str(error)
    finally:
        setattr(built, name, function)
    return "it had enough"


def serve_without_memory() -> str:
    torch.set_num_threads(2)
    base = prepare_base("tiny", tiny_model("llama").bfloat16(), None, CPU)
    kv = KVCache(base.kv_shapes, 16 << 20, base.dtype, CPU)
    decoder = NativeDecoder(base, kv)
    few, many = (batch(kv, [n], [n], [None], torch.zeros(1, dtype=base.dtype)) for n in (20, 100_000))
    with torch.no_grad():
        before = decoder.logits(few, torch.arange(20))
        told = starved("adapterhub_step", lambda: decoder.logits(many, torch.arange(1)))
        assert torch.equal(decoder.logits(few, torch.arange(20)), before)
    return told


def train_without_memory() -> str:
    """Of a team's members, each in the middle of a piece."""
    torch.set_num_threads(2)
    wide = LlamaConfig(**{**SHAPE, "hidden_size": 1024, "intermediate_size": 96})
    base = prepare_base("tiny", tiny_model(wide).bfloat16(), None, CPU)
    assert can_learn(base)
    forward = Forward(base)
    few, many = ([(None, [item(length, 0)])] for length in (20, 10_000))
    [before] = forward(few, record=False)
    told = starved("adapterhub_learn", lambda: forward(many, record=False))
    [after] = forward(few, record=False)
    assert torch.equal(after.logprobs, before.logprobs)
    return told


def in_a_process_of_its_own(work: Callable[[], str]) -> str:
    """The limit is the whole process's; and a process that ends is told from one that fails."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(keep_nothing).result()
        return pool.submit(work).result(timeout=120)


def keep_nothing() -> None:
    """What is freed goes back to the system, and is not there for what is taken next."""
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 17)


def test_a_step_without_memory_is_refused_and_the_next_one_is_done() -> None:
    assert in_a_process_of_its_own(serve_without_memory) == TOLD


@pytest.mark.skipif(library() is None or best_isa() < Isa.AVX512, reason="needs a processor with AVX-512 BF16")
def test_a_piece_of_training_without_memory_is_refused_and_the_next_one_is_done() -> None:
    assert in_a_process_of_its_own(train_without_memory) == TOLD
