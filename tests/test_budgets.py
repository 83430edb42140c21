"""What of a GPU's free memory becomes the pool and the KV cache, as plain numbers; and sizes that are not to be had."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.base import budgets, nvml
from adapterhub.base.budgets import Budgets, Needs, Shapes, allot, automatic_ram, split
from adapterhub.base.kv import KVCache
from adapterhub.base.nvml import Gpu
from adapterhub.config import MIB, Config
from adapterhub.errors import BadRequest
from adapterhub.swap.pool import Pool
from tests.tiny import tiny_base

GIB = 1024 * MIB
LLAMA_8B = Shapes(vocabulary=128_256, width=32 * 81_920, widest=18_432, itemsize=2)
QWEN_HALF_B = Shapes(vocabulary=151_936, width=24 * 22_528, widest=5_760, itemsize=2)


def config(**fields: Any) -> Config:
    return Config(data_dir=Path("unused"), **fields)


def halves(free: int, shapes: Shapes = LLAMA_8B, **fields: Any) -> tuple[int, int]:
    given = config(**fields)
    return split(free, Needs.of(shapes, given), given, "cuda:0")


@pytest.mark.parametrize("shapes", [LLAMA_8B, QWEN_HALF_B])
def test_an_empty_gpu_is_shared_by_adapters_kv_cache_and_computing(shapes: Shapes) -> None:
    free, needs = 64 * GIB, Needs.of(shapes, config())
    pool, kv = halves(free, shapes)
    assert pool + kv == free - needs.serving - needs.training
    assert kv - 2 * pool in (0, 1, 2)
    assert needs.serving > 32 * shapes.vocabulary * 4, "logits in fp32"
    assert needs.training > 1024 * shapes.vocabulary * 4


def test_on_a_small_gpu_training_takes_no_more_than_a_third() -> None:
    free = 6 * GIB
    needs = Needs.of(LLAMA_8B, config())
    assert needs.training > 2 * GIB
    assert sum(halves(free)) == free - needs.serving - free // 3


@pytest.mark.parametrize(
    "larger", [{"max_step_tokens": 512}, {"max_batch": 64}, {"train_micro_tokens": 2048}, {"train_jobs": 16}]
)
def test_larger_steps_and_pieces_have_more_set_aside(larger: dict[str, int]) -> None:
    assert sum(halves(64 * GIB, **larger)) < sum(halves(64 * GIB))


def test_what_is_given_is_had_and_the_other_takes_what_it_leaves() -> None:
    usual = halves(64 * GIB)
    assert halves(64 * GIB, device_bytes=GIB, kv_bytes=3 * GIB) == (GIB, 3 * GIB)
    assert halves(64 * GIB, device_bytes=GIB) == (GIB, usual[1])
    pool, kv = halves(64 * GIB, device_bytes=50 * GIB)
    assert (pool, kv) == (50 * GIB, sum(usual) - 50 * GIB)
    pool, kv = halves(64 * GIB, kv_bytes=50 * GIB)
    assert (pool, kv) == (sum(usual) - 50 * GIB, 50 * GIB)


@given(
    free=st.integers(0, 200 * GIB),
    device=st.none() | st.integers(0, 100 * GIB),
    kv=st.none() | st.integers(0, 100 * GIB),
    shapes=st.sampled_from([LLAMA_8B, QWEN_HALF_B]),
)
def test_never_more_than_what_is_free_and_computing_leaves(
    free: int, device: int | None, kv: int | None, shapes: Shapes
) -> None:
    needs = Needs.of(shapes, config())
    try:
        sizes = halves(free, shapes, device_bytes=device, kv_bytes=kv)
    except BadRequest:
        least = sum(64 * MIB if given is None else given for given in (device, kv))
        assert least > free - needs.serving
        return
    assert sum(sizes) <= free - needs.serving
    for size, given_size in zip(sizes, (device, kv), strict=True):
        assert size == given_size if given_size is not None else size > 0


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({"device_bytes": 30 * GIB}, "--device-bytes 30.0 GiB do"),
        ({"kv_bytes": 30 * GIB}, "--kv-bytes 30.0 GiB do"),
        ({"device_bytes": 12 * GIB, "kv_bytes": 12 * GIB}, "--device-bytes 12.0 GiB and --kv-bytes 12.0 GiB do"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_is_free_and_what_to_choose(fields: Any, asked: str) -> None:
    with pytest.raises(BadRequest) as refused:
        halves(20 * GIB, **fields)
    assert "cuda:0 has 20.0 GiB free" in refused.value.message
    assert asked in refused.value.message
    assert "Choose at most" in refused.value.message


def test_a_gpu_that_is_full_is_refused_with_what_to_do() -> None:
    with pytest.raises(BadRequest, match=r"leaves no room for adapters.*End other programs.*--quantize"):
        halves(100 * MIB)


def test_the_host_tier_beside_a_gpu_is_2_gib_or_a_quarter_of_the_memory() -> None:
    assert automatic_ram(None) == automatic_ram(64 * GIB) == 2 * GIB
    assert automatic_ram(4 * GIB) == GIB


# -- sizes that are not to be had after all


def full(most: int) -> Any:
    """A device on which whatever is larger than `most` runs out of memory."""

    def check(nbytes: int) -> None:
        if nbytes > most:
            raise torch.OutOfMemoryError(f"Tried to allocate {nbytes} bytes")

    class FullPool(Pool):
        def memory(self, capacity: int) -> torch.Tensor:
            check(capacity)
            return super().memory(capacity)

    def cache(shapes: Any, nbytes: int, *rest: Any) -> KVCache:
        check(nbytes)
        return KVCache(shapes, nbytes, *rest)

    return FullPool, cache


def test_a_size_that_was_chosen_and_is_not_to_be_had_is_halved_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = tiny_base()
    pool_class, cache_class = full(150 * MIB)
    monkeypatch.setattr(budgets, "Pool", pool_class)
    monkeypatch.setattr(budgets, "KVCache", cache_class)
    with caplog.at_level(logging.WARNING):
        found, cache, pool = allot(config(), base)
    assert found == Budgets(128 * MIB, 0, 128 * MIB)
    assert pool.capacity == 128 * MIB
    assert cache.capacity > 0
    assert len(caplog.records) == 3
    assert "has no 256.0 MiB for --kv-bytes" in caplog.text


def test_a_size_that_was_given_and_is_not_to_be_had_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    pool_class, cache_class = full(10 * MIB)
    monkeypatch.setattr(budgets, "Pool", pool_class)
    monkeypatch.setattr(budgets, "KVCache", cache_class)
    with pytest.raises(BadRequest, match=r"no 20\.0 MiB for --device-bytes(?s:.*)Choose less"):
        allot(config(device_bytes=20 * MIB, kv_bytes=MIB), tiny_base())
    with pytest.raises(BadRequest, match="for --kv-bytes"):
        allot(config(), tiny_base())


def test_on_a_gpu_budgets_go_by_what_is_free_and_on_a_cpu_they_are_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base()
    assert Budgets.of(config(ram_bytes=5), base) == Budgets(512 * MIB, 5, 256 * MIB)
    monkeypatch.setattr(budgets, "free_bytes", lambda device: 8 * GIB)
    monkeypatch.setattr(budgets, "available_bytes", lambda: 4 * GIB)
    on_gpu = dataclasses.replace(base, device=torch.device("cuda:0"))
    pool, ram, kv = Budgets.of(config(kv_bytes=GIB), on_gpu)
    assert (ram, kv) == (GIB, GIB)
    assert GIB < pool < 3 * GIB


class Nvml:
    """NVML of a GPU of which other programs have taken all but so many bytes."""

    NVMLError = ValueError

    def __init__(self, free: int | None) -> None:
        self.free = free

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Nvml:
        assert handle == "the handle"
        if self.free is None:
            raise ValueError("not supported")
        return self


@pytest.mark.parametrize(
    ("gpu", "free"),
    [
        (None, 5 * GIB),
        (Gpu(Nvml(3 * GIB), "the handle"), 3 * GIB),
        (Gpu(Nvml(7 * GIB), "the handle"), 5 * GIB),
        (Gpu(Nvml(None), "the handle"), 5 * GIB),
    ],
)
def test_free_is_what_nvml_and_cuda_both_leave(monkeypatch: pytest.MonkeyPatch, gpu: Gpu | None, free: int) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5 * GIB, 8 * GIB))
    monkeypatch.setattr(nvml, "gpu_of", lambda _: gpu)
    assert nvml.free_bytes(torch.device("cuda:0")) == free
