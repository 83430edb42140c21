"""Copies on a stream of their own, and how long they take, on a stand-in for `torch.cuda` with a clock of its own."""

from __future__ import annotations

import pytest
import torch

from adapterhub.base.pace import Pace
from adapterhub.swap.copies import StreamCopies, copies_to
from adapterhub.swap.pool import Pool
from tests.cuda import Cuda
from tests.tiny import CPU

GPU = torch.device("cuda", 1)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cuda = Cuda()
    cuda.plug_in(monkeypatch)
    cuda.set_device(GPU)
    return cuda


def copies_that_take(ms: float) -> StreamCopies:
    copies = copies_to(GPU)
    assert isinstance(copies, StreamCopies)
    copies._stream.takes = ms  # type: ignore[attr-defined]
    return copies


def test_a_copy_waits_for_what_uses_its_place_and_steps_wait_for_the_copy_alone(cuda: Cuda) -> None:
    compute, copies = cuda.current_stream(), copies_that_take(2)
    assert copies._stream.device == GPU
    compute.takes = 5
    after = copies.mark()
    compute.takes = 0
    source, target = torch.arange(6.0), torch.zeros(6)
    copy = copies.start(target, source, after)
    assert torch.equal(target, source)
    assert cuda.current_stream() is compute
    assert (copy.done(), compute.free) == (False, 5), "the engine's own stream has not waited"
    copy.join()
    assert compute.free == 7
    cuda.now = 6.9
    assert not copy.done()
    copy.wait()
    assert (copy.done(), cuda.now) == (True, 7)


def test_a_copy_takes_from_when_it_was_begun_until_it_has_ended_whoever_it_waits_for(cuda: Cuda) -> None:
    cuda.now = 100
    compute, copies = cuda.current_stream(), copies_that_take(2)
    first = copies.start(torch.zeros(1), torch.ones(1), copies.mark())
    behind = copies.start(torch.zeros(1), torch.ones(1), copies.mark())
    compute.takes = 5
    after = copies.start(torch.zeros(1), torch.ones(1), copies.mark())
    assert (first.ms, behind.ms, after.ms) == (2, 4, 7)
    assert cuda.now == 107


def test_on_a_thread_of_another_device_a_copy_goes_to_its_own(cuda: Cuda) -> None:
    copies = copies_that_take(2)
    after = copies.mark()
    cuda.set_device(0)
    other = cuda.current_stream()
    copies.start(torch.zeros(1), torch.ones(1), after)
    assert copies._stream.free == 2  # type: ignore[attr-defined]
    assert cuda.current_stream() is other


def test_a_pace_of_a_gpu_waits_for_all_but_the_last_steps_of_the_current_stream(cuda: Cuda) -> None:
    cuda.current_stream().takes = 10
    pace = Pace()
    for step in range(1, 8):
        pace.step()
        assert cuda.now == 10 * max(0, step - 3)
    pace.finish()
    assert cuda.now == 80


def test_a_pool_on_a_gpu_gives_its_memory_back_at_once_whoever_has_the_tensor(cuda: Cuda) -> None:
    pool = Pool(1 << 12, torch.float32, CPU)
    pool.device = GPU
    kept_by_a_graph = pool.tensor
    pool.let_go()
    assert kept_by_a_graph.untyped_storage().nbytes() == 0
    assert cuda.emptied == 1
