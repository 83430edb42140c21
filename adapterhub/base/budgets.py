"""How much memory of the device and of the host an engine may use for what: of a GPU, shares of what is free once what
computing needs is set aside, so that other programs keep theirs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

from adapterhub.base.kv import KVCache
from adapterhub.base.model import Base
from adapterhub.base.nvml import free_bytes
from adapterhub.base.scheduler import SCORED_ROWS
from adapterhub.base.triton.decoding import ROWS
from adapterhub.config import MIB, Config, format_bytes
from adapterhub.errors import BadRequest
from adapterhub.swap.memory import available_bytes
from adapterhub.swap.pool import Pool

log = logging.getLogger(__name__)
_ON_CPU = (512 * MIB, 0, 256 * MIB)
_RAM_MOST, _RAM_SHARE = 2048 * MIB, 1 / 4  # of the host's memory, with a GPU
_POOL_SHARE = 1 / 3  # of what is left for pool and KV cache
_LEAST = 64 * MIB  # of each, where sizes are chosen: with less there is no serving
# what is set aside
_FIXED = 512 * MIB  # workspaces of cuBLAS, kernels, graphs' own memory, and what a caching allocator loses
_SAMPLING = 24  # bytes for a logit: in the base's dtype, in fp32, as log probabilities, and sorted with indices
_LEARNING = 20  # bytes for a logit that is learned: in the base's dtype, in fp32, normalized, and the gradients
_STATE = 16  # bytes for a trained number: fp32, its gradient and Adam's moments
_ALIVE = 4  # times the widest linear's input and output, while one layer computes
_TRAINED_RANK = 16  # of a usual job
_TRAIN_MOST = 1 / 3  # of what is free: where training needs more, its pieces may fail for want of memory
T = TypeVar("T")


class Shapes(NamedTuple):
    """What of a base decides how much memory it needs to compute."""

    vocabulary: int
    width: int  # of all its linears, inputs and outputs together
    widest: int  # linear's input and output
    itemsize: int

    @classmethod
    def of(cls, base: Base) -> Shapes:
        widest = max(target.width for target in base.layout.targets)
        return cls(base.vocabulary, base.layout.width, widest, base.dtype.itemsize)


class Needs(NamedTuple):
    """Bytes that are set aside for computing."""

    serving: int
    training: int

    @classmethod
    def of(cls, shapes: Shapes, config: Config) -> Needs:
        step = config.max_step_tokens * _ALIVE * shapes.widest * shapes.itemsize
        wanted = min(config.max_batch + SCORED_ROWS, config.max_step_tokens)
        sampling = wanted * shapes.vocabulary * _SAMPLING
        graphs = 2 * sum(ROWS) * shapes.vocabulary * shapes.itemsize  # each has its logits; with and without adapters
        kept = config.train_micro_tokens * shapes.width * shapes.itemsize  # of a forward, for its backward
        learning = config.train_micro_tokens * shapes.vocabulary * _LEARNING
        state = config.train_jobs * _TRAINED_RANK * shapes.width * _STATE
        return cls(_FIXED + step + sampling + graphs, kept + learning + state)


class Budgets(NamedTuple):
    """Bytes."""

    device: int  # the pool of adapters
    ram: int  # the tier of adapters in RAM
    kv: int  # the KV cache

    @classmethod
    def of(cls, config: Config, base: Base) -> Budgets:
        """The sizes that were given, and for the others what suits the device. Raises BadRequest when they do not fit
        there."""
        if base.device.type == "cuda":
            pool, kv = split(free_bytes(base.device), Needs.of(Shapes.of(base), config), config, str(base.device))
            chosen = cls(pool, automatic_ram(available_bytes()), kv)
        else:
            chosen = cls(*_ON_CPU)
        given = (config.device_bytes, config.ram_bytes, config.kv_bytes)
        return cls(*(c if g is None else g for c, g in zip(chosen, given, strict=True)))


def automatic_ram(available: int | None) -> int:
    """The host tier beside a GPU, where the host has so much memory left."""
    return _RAM_MOST if available is None else min(_RAM_MOST, int(available * _RAM_SHARE))


def split(free: int, needs: Needs, config: Config, device: str) -> tuple[int, int]:
    """Bytes of the pool and of the KV cache on a GPU with so many free. Raises BadRequest when they do not fit there.

    What is given may use what training would have needed; what is chosen may not.
    """
    given = (config.device_bytes or 0) + (config.kv_bytes or 0)
    unset = (config.device_bytes is None) + (config.kv_bytes is None)
    most = free - needs.serving
    if given + unset * _LEAST > most:
        raise BadRequest(_too_much(free, needs, config, device))
    rest = max(most - min(needs.training, int(free * _TRAIN_MOST)), given + unset * _LEAST)
    pool, kv = int(rest * _POOL_SHARE), rest - int(rest * _POOL_SHARE)
    if config.kv_bytes is not None:
        pool, kv = min(pool, rest - config.kv_bytes), config.kv_bytes
    if config.device_bytes is not None:
        pool, kv = config.device_bytes, min(kv, rest - config.device_bytes)
    return pool, kv


def allot(config: Config, base: Base) -> tuple[Budgets, KVCache, Pool]:
    """The budgets, and what they are for on the device. A size that was chosen and is not to be had after all is
    halved, with a warning. Raises BadRequest when what was given is not to be had, or too little is left."""
    budgets = Budgets.of(config, base)
    device, dtype = base.device, base.dtype
    kv, cache = _halving(
        "--kv-bytes", budgets.kv, config.kv_bytes, device, lambda n: KVCache(base.kv_shapes, n, dtype, device)
    )
    size, pool = _halving(
        "--device-bytes", budgets.device, config.device_bytes, device, lambda n: Pool(n, dtype, device)
    )
    return budgets._replace(device=size, kv=kv), cache, pool


def _halving(
    option: str, nbytes: int, given: int | None, device: torch.device, make: Callable[[int], T]
) -> tuple[int, T]:
    while True:
        try:
            return nbytes, make(nbytes)
        except torch.OutOfMemoryError as error:
            if given is not None or nbytes // 2 < _LEAST:
                raise BadRequest(
                    f"{device} has no {format_bytes(nbytes)} for {option}: {error}\nChoose less, or end other programs "
                    "that use it."
                ) from error
            log.warning("%s has no %s for %s: trying half of that.", device, format_bytes(nbytes), option)
            nbytes //= 2


def _too_much(free: int, needs: Needs, config: Config, device: str) -> str:
    told = f"{device} has {format_bytes(free)} free, of which this base needs {format_bytes(needs.serving)} to compute"
    sizes = (("--device-bytes", config.device_bytes), ("--kv-bytes", config.kv_bytes))
    asked = " and ".join(f"{option} {format_bytes(size)}" for option, size in sizes if size is not None)
    least = 2 * _LEAST
    if free - needs.serving < least:
        return (
            f"{told}: that leaves no room for adapters and the KV cache, which need {format_bytes(least)} at least. "
            "End other programs that use it, or serve a smaller base, or this one with --quantize."
        )
    return (
        f"{told}: {asked} do not fit. Choose at most {format_bytes(free - needs.serving)} for both together, "
        f"{format_bytes(_LEAST)} or more for each, or end other programs that use it."
    )
