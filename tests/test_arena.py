"""The host tier's memory: what it takes, and that a GPU's driver is told of exactly that. The driver is a stand-in."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from adapterhub.errors import BadRequest
from adapterhub.swap.arena import Arena

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Driver:
    """`cudart` with the calls that lock memory; `refuses` with that error."""

    class cudaError:
        success = 0

    def __init__(self, refuses: int = 0) -> None:
        self.refuses = refuses
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if not self.refuses:
            self.registered[address] = nbytes
        return self.refuses

    def cudaGetErrorString(self, error: int) -> str:
        return f"error {error}"

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


def plug_in(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())


def settled(arena: Arena) -> Any:
    locked = arena._locked
    assert locked is not None
    locked._thread.join()
    return locked


def test_a_gpu_s_driver_locks_exactly_the_budget_and_the_place_to_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    plug_in(driver, monkeypatch)
    arena = Arena(3000 * 256, 2 * 256, torch.bfloat16, GPU)
    settled(arena)
    assert arena.is_locked
    assert driver.registered == {arena.view(0, 256).data_ptr(): 3002 * 256}
    arena.close()
    assert not driver.registered


def test_memory_that_cannot_be_locked_serves_all_the_same_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plug_in(Driver(refuses=2), monkeypatch)
    with caplog.at_level(logging.WARNING):
        arena = Arena(1024, 0, torch.bfloat16, GPU)
        settled(arena)
    [record] = caplog.records
    assert "cannot be page-locked, so that copies to cuda:0 take longer: error 2" in record.getMessage()
    assert not arena.is_locked
    arena.view(256, 512).fill_(1.0)
    arena.close()


def test_more_than_the_system_has_is_refused_before_it_is_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterhub.swap.arena.available_bytes", lambda: 1000)
    with pytest.raises(BadRequest, match=r"RAM tier of 4.0 KiB .*1000 B are left.*--ram-bytes"):
        Arena(4096, 0, torch.bfloat16, GPU)
    with pytest.raises(BadRequest, match="more host memory than the system gives"):
        Arena(1 << 60, 0, torch.bfloat16, CPU)


def test_places_to_pass_through_lie_beside_what_ram_keeps() -> None:
    arena = Arena(1024, 512, torch.float32, CPU)
    first, second = arena.stage(200), arena.stage(256)
    assert (first, second, arena.stage(1)) == (1024, 1280, None)
    kept, passing = arena.view(0, 1024), arena.view(1280, 200)
    kept.fill_(1.0)
    passing.fill_(2.0)
    assert (kept == 1.0).all()
    assert passing.shape == (50,)
    assert first is not None
    arena.unstage(first)
    assert arena.stage(256) == 1024
