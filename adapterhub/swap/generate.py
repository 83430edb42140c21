"""Traces that nobody made: who asks how often follows Zipf's law, or S-LoRA's power law, and arrivals are Gamma
distributed, as S-LoRA generates them. Shared by `policy simulate` and the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from adapterhub.swap.frames import Adapter, Trace
from adapterhub.swap.ref import Tier

RANK_BYTES = 610_560  # of the embedded base, all linears targeted, 16 bits
RATE = 5.0  # requests per second
CV = 2.0  # of the gaps between requests: 1 would be a Poisson process, more is burstier


class Shape(StrEnum):
    ZIPF = "zipf"
    POWER = "power"


def zipf(adapters: int, requests: int, skew: float, seed: int = 0) -> NDArray[np.int64]:
    """[requests] indices below `adapters`; the k-th is asked for with a probability that goes with 1 / k**skew."""
    weights = 1 / np.arange(1, adapters + 1) ** skew
    return np.random.default_rng(seed).choice(adapters, requests, p=weights / weights.sum())


def power(adapters: int, requests: int, alpha: float, seed: int = 0) -> NDArray[np.int64]:
    """[requests] indices below `adapters`, as S-LoRA chooses them: the smaller `alpha`, the more skewed."""
    drawn = np.random.default_rng(seed).power(alpha, requests)  # up to 1, which rounding may give
    return np.minimum(drawn * adapters, adapters - 1).astype(np.int64)


def arrivals(requests: int, rate: float = RATE, cv: float = CV, seed: int = 1) -> NDArray[np.float64]:
    """[requests] seconds at which requests come: gaps are Gamma distributed, 1 / rate in the mean."""
    return np.cumsum(np.random.default_rng(seed).gamma(1 / cv**2, cv**2 / rate, requests))


def generate(shape: Shape, adapters: int, requests: int, skew: float, ranks: Sequence[int]) -> Trace:
    """A trace over `adapters`, each its own owner's, whose ranks are taken from `ranks` in turn. `skew` is Zipf's
    exponent, or the power law's alpha."""
    chosen = (zipf if shape is Shape.ZIPF else power)(adapters, requests, skew)
    named = [Adapter(f"v{i}", f"digest-{i}", f"user-{i}", ranks[i % len(ranks)] * RANK_BYTES) for i in range(adapters)]
    nowhere = np.full(requests, Trace.TIERS.index(Tier.DISK), np.uint8)
    return Trace(named, arrivals(requests), chosen, nowhere, np.zeros(requests, np.float32))
