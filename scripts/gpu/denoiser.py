"""A diffusers denoiser of SDXL's shape: steps in which every sample has its user's adapter, beside PEFT and the rate of
products. It needs diffusers."""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import logging
from figure import Figure
from peft import LoraConfig, get_peft_model
from random_blocks import random_block
from torch.utils.flop_counter import FlopCounterMode

from adapterhub.base.denoiser import Denoiser, prepare_denoiser
from adapterhub.swap.hold import Hold
from adapterhub.swap.pool import Pool
from gpu.clock import Clock
from gpu.limits import Limits, seconds
from gpu.report import Check
from gpu.stage import RANK, release, with_the_same_weights
from tests.denoisers import SDXL, TINY_SDXL, Inputs, held, predicted, stepped, tiny_unet, unet_inputs, zoo_of
from tests.tiny import stored

SAMPLES, SIDE, TOKENS = 8, 128, 77  # latents of pictures of 1024 x 1024, and their prompts
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
_REPEATS = 5
_SIZE = 0.05  # of a random adapter's numbers, which then changes a sample by far more than rounding does
_ALONE = 2  # samples of the mixed batch that are also computed alone

logging.set_verbosity_error()  # it warns of casts that lose nothing


def denoiser_checks(device: torch.device) -> Iterator[tuple[str, Callable[[str], Check]]]:
    """Each check's name, and what does the check of that name."""
    for dtype in TOLERANCES:
        name = f"denoiser, {str(dtype).removeprefix('torch.')}: samples of several users are what PEFT makes of each"
        yield name, partial(check_mixed, dtype, device)


def check_mixed(dtype: torch.dtype, device: torch.device, name: str) -> Check:
    """PEFT computes in fp32, with the very weights that are served."""
    rounded, inputs = tiny_unet().to(dtype), unet_inputs(TINY_SDXL, 4, 20, 7, dtype, device)
    example = inputs.some(range(3))
    denoiser = prepare_denoiser(copy.deepcopy(rounded).to(device), example.samples, **example.others)
    with tempfile.TemporaryDirectory() as made, zoo_of(rounded.float(), denoiser, device, Path(made)) as zoo:
        mixed = stepped(denoiser, [None, *zoo.holds], zoo.pool, inputs)
        wide = inputs.to(torch.float32)
        alone = [predicted(oracle, wide.some([i])) for i, oracle in enumerate([zoo.plain, *zoo.oracles])]
    errors = [_error(*pair) for pair in zip(mixed, torch.cat(alone), strict=True)]
    detail = f"the worst of {len(errors)} samples off by {max(errors):.2g} of its norm, {TOLERANCES[dtype]:g} allowed"
    return Check(name, all(error <= TOLERANCES[dtype] for error in errors), detail)  # NaN is not


def denoiser_figures(
    device: torch.device, limits: Limits, quick: bool, clock: Clock
) -> tuple[str, Callable[[], list[Figure]]]:
    """The section's title, and what measures it."""
    config, count, side = (TINY_SDXL, 3, 20) if quick else (SDXL, SAMPLES, SIDE)
    inputs = unet_inputs(config, count, side, TOKENS, torch.bfloat16, device)
    samples = f"{count} samples of {side} x {side}, adapters of rank {RANK} on all linears, bf16"
    return f"Denoiser ({'a tiny model of ' if quick else ''}SDXL's shape, {samples})", partial(
        denoise, config, inputs, limits, clock
    )


def denoise(config: dict[str, Any], inputs: Inputs, limits: Limits, clock: Clock) -> list[Figure]:
    """Milliseconds of one step of all samples: ours, then PEFT's with the same weights. Raises RuntimeError when a
    sample is not the same alone."""
    device = inputs.samples.device
    torch.manual_seed(0)
    with device:
        plain = UNet2DConditionModel(**config).requires_grad_(False).eval().bfloat16()
    with FlopCounterMode(display=False) as counter:
        predicted(plain, inputs)
    figures = ours(plain, inputs, counter.get_total_flops() / limits.product * 1e3)
    release(device)
    if clock.may("PEFT's steps of a denoiser"):
        figures += pefts(plain, inputs, figures[-1].median)
    del plain
    release(device)
    return figures


def ours(plain: UNet2DConditionModel, inputs: Inputs, least: float) -> list[Figure]:
    """Of the base, of one adapter for all samples, and of one for each."""
    device, count = inputs.samples.device, len(inputs.samples)
    example = inputs.some(range(3))
    denoiser = prepare_denoiser(with_the_same_weights(plain), example.samples, **example.others)
    figures, alone = [], 0.0
    with tempfile.TemporaryDirectory() as made:
        blocks = (random_block(denoiser, denoiser.layout, RANK, seed, _SIZE) for seed in range(count))
        refs = [stored(block, Path(made)) for block in blocks]
        with held(denoiser, refs, Path(made)) as (pool, holds):
            figures.append(beside_alone(denoiser, pool, holds, inputs))
            kinds: dict[str, Sequence[Hold | None]] = {
                "base": [None] * count,
                "one adapter": [holds[0]] * count,
                "all different": holds,
            }
            for kind, adapters in kinds.items():
                times = _times(device, partial(stepped, denoiser, adapters, pool, inputs))
                alone = alone or statistics.median(times)
                note = f"{statistics.median(times) / alone:.2f} times base; {least:.3g} ms at the rate of products"
                figures.append(Figure.of(f"step, {kind}", "ms", times, note))
    return figures


def beside_alone(denoiser: Denoiser, pool: Pool, holds: Sequence[Hold], inputs: Inputs) -> Figure:
    """By how much of its norm a sample of a mixed batch differs from the same alone. Raises RuntimeError where that is
    not far less than what its adapter changes."""
    mixed, base = (stepped(denoiser, adapters, pool, inputs) for adapters in (holds, [None] * len(holds)))
    errors, changes = [], []
    for i in range(len(holds))[-_ALONE:]:
        alone = stepped(denoiser, [holds[i]], pool, inputs.some([i]))[0]
        errors.append(_error(mixed[i], alone))
        changes.append(_error(base[i], alone))
    if not max(errors) <= min(changes) / 4:
        raise RuntimeError(f"Mixed and alone differ by {errors} of the norm, base and alone by {changes}.")
    note = f"of its norm; its adapter changes it by {min(changes):.2g}"
    return Figure.of("a sample in a mixed batch differs from itself alone by", "", errors, note)


def pefts(plain: UNet2DConditionModel, inputs: Inputs, different: float) -> list[Figure]:
    """Of one adapter for all samples, and of one for each; `different`: milliseconds of ours."""
    device, count = inputs.samples.device, len(inputs.samples)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights=False)
    names = [f"{i}" for i in range(count)]
    with device:
        model: Any = get_peft_model(with_the_same_weights(plain), config, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
    model.to(torch.bfloat16).eval()
    one = _times(device, partial(predicted, model, inputs))
    mixed = Inputs(inputs.samples, {**inputs.others, "adapter_names": names})
    several = _times(device, partial(predicted, model, mixed))
    note = f"{statistics.median(several) / different:.2f} times ours"
    return [
        Figure.of("PEFT: step, one adapter", "ms", one),
        Figure.of("PEFT: step, all different", "ms", several, note),
    ]


def _times(device: torch.device, step: Callable[[], object]) -> list[float]:
    """Milliseconds."""
    return [s * 1e3 for s in seconds(device, step, _REPEATS)]


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())
