"""Captures on a stand-in for `torch.cuda`, around which everything is real, torch's own `graph` too."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

pytest.importorskip("triton")

from adapterhub.base import nvml
from adapterhub.base.kv import KVCache
from adapterhub.base.runner import Runner
from adapterhub.base.triton.capture import Capturer, Watch
from adapterhub.base.triton.decoding import DecodeSteps
from adapterhub.swap.pool import Pool
from tests.cuda import BROKEN, Cuda
from tests.kernels import forward_of
from tests.scarce import NO_MEMORY
from tests.test_triton import FP32, ONE_LAYER, served
from tests.tiny import CPU, GROUPED, kv_bytes, tiny_base

GPUS = tuple(torch.device("cuda", index) for index in range(2))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cuda = Cuda()
    cuda.plug_in(monkeypatch)
    return cuda


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_each_device_captures_on_streams_of_its_own(cuda: Cuda) -> None:
    launched: list[tuple[torch.device, torch.device, bool]] = []

    def engine(device: torch.device) -> None:
        cuda.set_device(device)
        capturer = Capturer(device)

        def forward() -> torch.Tensor:
            current = torch.device("cuda", cuda.current_device())
            launched.append((device, current, cuda.current_stream().device == current))
            return torch.zeros(1)

        for _ in range(2):
            capturer.capture(forward)
        assert cuda.current_stream() is not capturer._stream

    for device in GPUS:
        in_thread(lambda device=device: engine(device)).join()
    assert launched == [(device, device, True) for device in GPUS for _ in range(6)]
    assert [stream.device for stream in cuda.captures] == [GPUS[0], GPUS[0], GPUS[1], GPUS[1]]
    assert len(set(cuda.captures)) == 2
    assert not cuda.faults


class OnGpu:
    """What gives memory back, as if it were on the other GPU."""

    def __init__(self) -> None:
        base = tiny_base("llama")
        self.pool = Pool(1 << 10, FP32, CPU)
        self.runner = Runner(base, KVCache(base.kv_shapes, kv_bytes(base, 8), FP32, CPU), self.pool)
        self.pool.device = GPUS[1]
        self.runner.base = replace(base, device=GPUS[1])


@pytest.mark.parametrize("other", ["capture", "let go of a pool", "give back", "free bytes"])
def test_nobody_empties_caches_or_captures_while_another_device_captures(
    cuda: Cuda, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1, 1), raising=False)
    monkeypatch.setattr(nvml, "gpu_of", lambda _: None)
    there = OnGpu()
    begins: dict[str, Callable[[], object]] = {
        "capture": lambda: Capturer(GPUS[1]).capture(lambda: torch.zeros(1)),
        "let go of a pool": there.pool.let_go,
        "give back": there.runner.give_back,
        "free bytes": lambda: nvml.free_bytes(GPUS[1]),
    }
    threads: list[threading.Thread] = []

    def forward() -> torch.Tensor:
        if cuda.under_way:
            threads.append(in_thread(begins[other]))
            threads[0].join(0.1)  # it cannot end before this does; it has the time to break a rule
        return torch.zeros(1)

    emptied = cuda.emptied
    Capturer(GPUS[0]).capture(forward)
    threads[0].join()
    assert not cuda.faults
    assert not cuda.under_way
    assert cuda.emptied == emptied + 2, "torch's graph does it first, and then the other"


@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError(NO_MEMORY)])
def test_after_a_capture_that_breaks_the_allocator_and_the_current_stream_are_as_before(
    cuda: Cuda, error: Exception | None
) -> None:
    capturer, before = Capturer(GPUS[0]), cuda.current_stream()

    def forward() -> torch.Tensor:
        if cuda.under_way and error is not None:
            raise error
        return torch.zeros(1)

    cuda.breaks = True
    with pytest.raises(RuntimeError, match=BROKEN):
        capturer.capture(forward)
    assert cuda.current_stream() is before
    torch.cuda.empty_cache()  # or it fails for ever
    cuda.breaks, error = False, None
    capturer.capture(forward)
    assert not cuda.faults


def test_a_later_torch_that_leaves_the_allocator_in_order_itself_is_no_error(cuda: Cuda) -> None:
    def forward() -> torch.Tensor:
        if cuda.under_way:
            raise ValueError("in the forward")
        return torch.zeros(1)

    with pytest.raises(ValueError, match="in the forward"):
        Capturer(GPUS[0]).capture(forward)
    assert not cuda.under_way


def test_a_base_that_looks_at_the_device_in_every_step_is_never_captured(
    cuda: Cuda, caplog: pytest.LogCaptureFixture
) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    for config, graphs in ((LlamaConfig(**GROUPED, rope_parameters=rope), 0), (ONE_LAYER, 1)):
        base = served(config)
        steps = DecodeSteps(base, KVCache(base.kv_shapes, kv_bytes(base, 8), FP32, CPU), Pool(1 << 10, FP32, CPU))
        steps._captures, steps._capturer = True, Capturer(GPUS[0])
        with torch.no_grad():
            for context in (1, 2):
                steps.logits(forward_of([1], [context], [None]))
        assert (steps.graphs, len(cuda.captures)) == (graphs, graphs)
    assert caplog.text.count("looks at the device's numbers in every step (_local_scalar_dense)") == 1


def test_what_is_watched_for_is_what_depends_on_numbers() -> None:
    x, mask, places = torch.arange(4.0), torch.tensor([True, False, True, True]), torch.tensor([3, 1])
    for harmless in (lambda: x[places], lambda: x * mask, lambda: torch.where(mask, x, 0.0), lambda: x.cumsum(0)):
        with Watch() as watch:
            harmless()
        assert not watch.looked
    for looks in (lambda: x[mask], lambda: x.sum().item(), lambda: bool(mask.all()), mask.nonzero, lambda: x.unique()):
        with Watch() as watch:
            looks()
        assert watch.looked
