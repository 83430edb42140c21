"""Tiny random denoisers of the structure of real ones, with adapters made by PEFT that lie in a pool.

Imports no web server, so that `scripts/gpu_check` goes through the same cases on a device.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import nn

from adapterhub.base.denoiser import Denoiser
from adapterhub.swap import peft
from adapterhub.swap.disk import DiskTier
from adapterhub.swap.hold import Hold
from adapterhub.swap.pool import Pool
from adapterhub.swap.ref import AdapterRef
from adapterhub.swap.tiers import Tiers
from tests.tiny import peft_model, saved, stored

SDXL: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),  # which diffusers takes for the number of heads
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TINY_SDXL: dict[str, Any] = {
    **SDXL,
    "sample_size": 20,
    "block_out_channels": (16, 32, 48),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 3),
    "cross_attention_dim": 40,
    "norm_num_groups": 8,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}
TINY_FLUX: dict[str, Any] = {
    "in_channels": 8,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (4, 6, 6),
}
# of both structures, each with some of the linears of its own
ADAPTERS: list[dict[str, Any]] = [
    {"r": 4, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]},
    {"r": 18, "use_rslora": True, "target_modules": ["attn2.to_v", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]},
    {"r": 3, "target_modules": ["linear_1", "linear_2", "time_emb_proj", "attn1.to_q", "attn2.to_k"]},
]


_SHARED = ("img_ids", "txt_ids")  # arguments that are the same for all samples


class Inputs(NamedTuple):
    """What a denoiser takes: n samples, and the other arguments, of which most have one entry for each sample."""

    samples: torch.Tensor
    others: dict[str, Any]

    def some(self, which: Sequence[int]) -> Inputs:
        """Of some of the samples."""

        def picked(values: dict[str, Any]) -> dict[str, Any]:
            return {
                name: value if name in _SHARED else picked(value) if isinstance(value, dict) else value[list(which)]
                for name, value in values.items()
            }

        return Inputs(self.samples[list(which)], picked(self.others))

    def to(self, dtype: torch.dtype) -> Inputs:
        """With its numbers, but for times, in `dtype`."""

        def cast(values: dict[str, Any]) -> dict[str, Any]:
            return {name: cast(v) if isinstance(v, dict) else _cast(v, dtype) for name, v in values.items()}

        return Inputs(self.samples.to(dtype), cast(self.others))


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def unet_inputs(
    config: dict[str, Any], count: int, size: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> Inputs:
    """`count` samples of size x size, at times of their own."""
    generator = torch.Generator(device).manual_seed(count)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    others = {
        "timestep": torch.arange(count, device=device) * 37 + 200,
        "encoder_hidden_states": noise(count, tokens, config["cross_attention_dim"]),
        "added_cond_kwargs": {
            "text_embeds": noise(count, pooled),
            "time_ids": torch.tensor([8.0 * size, 8.0 * size, 0, 0, 8.0 * size, 8.0 * size], device=device)
            .to(dtype)
            .repeat(count, 1),
        },
    }
    return Inputs(noise(count, config["in_channels"], size, size), others)


def flux_inputs(count: int) -> Inputs:
    """`count` samples of 3 x 4 patches."""
    generator = torch.Generator().manual_seed(count)
    places = torch.tensor([[0.0, y, x] for y in range(3) for x in range(4)])
    others = {
        "encoder_hidden_states": torch.randn(count, 5, TINY_FLUX["joint_attention_dim"], generator=generator),
        "pooled_projections": torch.randn(count, TINY_FLUX["pooled_projection_dim"], generator=generator),
        "timestep": torch.arange(1, count + 1) / 10,
        "img_ids": places,
        "txt_ids": torch.zeros(5, 3),
    }
    return Inputs(torch.randn(count, 12, TINY_FLUX["in_channels"], generator=generator), others)


def tiny_unet() -> UNet2DConditionModel:
    """Of SDXL's structure, in fp32."""
    torch.manual_seed(0)
    return UNet2DConditionModel(**TINY_SDXL).eval()


def tiny_flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(**TINY_FLUX).eval()


def predicted(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """What the model itself, or PEFT's around it, makes of all samples."""
    with torch.no_grad():
        return model(inputs.samples, **inputs.others).sample


def stepped(denoiser: Denoiser, adapters: Sequence[Hold | None], pool: Pool, inputs: Inputs) -> torch.Tensor:
    """What a step makes of samples with these adapters."""
    return denoiser.step(adapters, pool, inputs.samples, **inputs.others).sample


@dataclass
class Zoo:
    """A denoiser, an adapter for each of `ADAPTERS` in its pool, and PEFT's models of the same."""

    denoiser: Denoiser
    pool: Pool
    holds: list[Hold]
    plain: nn.Module
    oracles: list[nn.Module]


@contextmanager
def zoo_of(plain: nn.Module, denoiser: Denoiser, device: torch.device, directory: Path) -> Iterator[Zoo]:
    """`denoiser` is made of the weights of `plain`, in fp32 or fewer bits, and is on the device; `plain` goes there,
    too. The adapters go by way of PEFT's files and blocks on disk."""
    oracles, refs = [], []
    for seed, config in enumerate(ADAPTERS):
        oracle = peft_model(plain, seed=seed, size=0.12, **{"task_type": None, "lora_alpha": 6, **config})
        text, weights = saved(oracle, directory / f"peft-{seed}")
        block = peft.encode(peft.read_config(text), weights, denoiser.layout, denoiser.fingerprint, denoiser.dtype)
        refs.append(stored(block, directory / "blobs"))
        oracles.append(oracle.to(device))
    with held(denoiser, refs, directory / "blobs") as (pool, holds):
        yield Zoo(denoiser, pool, holds, copy.deepcopy(plain).to(device), oracles)


@contextmanager
def held(denoiser: Denoiser, refs: Sequence[AdapterRef], blobs: Path) -> Iterator[tuple[Pool, list[Hold]]]:
    """A pool into which these adapters have been loaded, and a hold on each."""
    arrived = threading.Event()
    pool = Pool(2 * sum(ref.nbytes for ref in refs), denoiser.dtype, denoiser.device)
    disk, fingerprint, layout = DiskTier(blobs), denoiser.fingerprint, denoiser.layout
    tiers = Tiers(pool, disk, fingerprint, layout, ram_bytes=0, load_threads=1, wake=arrived.set)
    try:
        holds = [hold for ref in refs if (hold := tiers.acquire(ref)) is not None]
        while not all(hold.ready for hold in holds):
            assert arrived.wait(10)
            arrived.clear()
            tiers.poll()
            assert not any(hold.error for hold in holds)
        yield pool, holds
    finally:
        tiers.close()
