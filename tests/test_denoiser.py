"""Denoisers of many users' samples, against PEFT with one adapter at a time and against each sample alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adapterhub.base import denoiser as serving
from adapterhub.base.denoiser import Denoiser, prepare_denoiser
from adapterhub.base.inject import MultiplexedLinear
from tests.denoisers import (
    TINY_SDXL,
    Inputs,
    Zoo,
    flux_inputs,
    predicted,
    stepped,
    tiny_flux,
    tiny_unet,
    unet_inputs,
    zoo_of,
)
from tests.kernels import close
from tests.tiny import CPU

CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 2e-5}
GUIDANCE = 5.0


def unet_of(count: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """10 x 10 and 5 x 5 rows of each sample where attention is: two tiles and one, and 7 of its prompt."""
    return unet_inputs(TINY_SDXL, count, 20, 7, dtype, CPU)


def served(model: nn.Module, example: Inputs) -> Denoiser:
    return prepare_denoiser(copy.deepcopy(model), example.samples, **example.others)


both_ways = pytest.mark.parametrize("unet", ["torch", "triton"], indirect=True)


@pytest.fixture
def unet(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Zoo]:
    if getattr(request, "param", "torch") == "triton":
        monkeypatch.setattr(serving, "usable", lambda device: True)
    model = tiny_unet()
    with zoo_of(model, served(model, unet_of(3)), CPU, tmp_path) as zoo:
        yield zoo


@both_ways
def test_a_mixed_batch_is_what_each_sample_gets_alone_and_what_peft_computes(unet: Zoo) -> None:
    users = [2, None, 0, 0, 1]
    inputs = unet_of(len(users))
    holds = [None if user is None else unet.holds[user] for user in users]
    mixed = stepped(unet.denoiser, holds, unet.pool, inputs)
    base = stepped(unet.denoiser, [None] * len(users), unet.pool, inputs)
    for i, user in enumerate(users):
        one = inputs.some([i])
        oracle = unet.plain if user is None else unet.oracles[user]
        expected = predicted(oracle, one)[0]
        assert torch.allclose(mixed[i], expected, **CLOSE)
        assert torch.allclose(stepped(unet.denoiser, [holds[i]], unet.pool, one)[0], expected, **CLOSE)
        changed = (mixed[i] - base[i]).norm() / base[i].norm()
        assert torch.equal(mixed[i], base[i]) if user is None else changed > 0.05


def test_a_request_with_guidance_is_two_samples_and_denoises_beside_others(unet: Zoo) -> None:
    """Three requests, one of them of the base, for a few steps; the samples without the prompt come first."""
    users = [1, None, 0]
    holds = [None if user is None else unet.holds[user] for user in users]
    inputs = unet_of(6)

    def denoised(predict: Callable[[Inputs], torch.Tensor], inputs: Inputs) -> torch.Tensor:
        latents = inputs.samples[: len(inputs.samples) // 2]
        for time in (900, 500, 100):
            others = {**inputs.others, "timestep": torch.full_like(inputs.others["timestep"], time)}
            without, prompted = predict(Inputs(latents.repeat(2, 1, 1, 1), others)).chunk(2)
            latents = latents - 0.2 * (without + GUIDANCE * (prompted - without))
        return latents

    together = denoised(partial(stepped, unet.denoiser, [*holds, *holds], unet.pool), inputs)
    for i, user in enumerate(users):
        oracle = unet.plain if user is None else unet.oracles[user]
        expected = denoised(partial(predicted, oracle), inputs.some([i, i + 3]))
        assert torch.allclose(together[i], expected[0], **CLOSE)


def test_in_bf16_it_differs_from_peft_in_fp32_by_rounding_alone(tmp_path: Path) -> None:
    rounded, inputs = tiny_unet().bfloat16(), unet_of(4, torch.bfloat16)
    denoiser = served(rounded, inputs.some([0, 1, 2]))
    with zoo_of(rounded.float(), denoiser, CPU, tmp_path) as zoo:
        mixed = stepped(denoiser, [None, *zoo.holds], zoo.pool, inputs)
        for i, oracle in enumerate([zoo.plain, *zoo.oracles]):
            close(mixed[i].float(), predicted(oracle, inputs.some([i]).to(torch.float32))[0], 3e-2)


def test_a_transformer_denoises_alike(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for kernels in (False, True):
        monkeypatch.setattr(serving, "usable", lambda device, kernels=kernels: kernels)
        model = tiny_flux()
        directory = tmp_path / str(kernels)
        with zoo_of(model, served(model, flux_inputs(5)), CPU, directory) as zoo:
            users = [0, None, 1]
            holds = [None if user is None else zoo.holds[user] for user in users]
            mixed = stepped(zoo.denoiser, holds, zoo.pool, flux_inputs(3))
            for i, user in enumerate(users):
                oracle = zoo.plain if user is None else zoo.oracles[user]
                assert torch.allclose(mixed[i], predicted(oracle, flux_inputs(3).some([i]))[0], **CLOSE)


def test_every_linear_can_be_targeted_and_those_that_read_the_same_compute_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serving, "usable", lambda device: True)
    model = tiny_unet()
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    denoiser = served(model, unet_of(3))
    assert [target.name for target in denoiser.layout.targets] == linears
    for name, module in denoiser.model.named_modules():
        if isinstance(module, MultiplexedLinear):
            attention, _, own = name.rpartition(".")
            together = own in (("to_q", "to_k", "to_v") if attention.endswith("attn1") else ("to_k", "to_v"))
            assert (module.together is not None) is together


@both_ways
def test_outside_of_a_step_it_is_the_base(unet: Zoo) -> None:
    inputs = unet_of(2)
    stepped(unet.denoiser, [unet.holds[0]] * 2, unet.pool, inputs)
    assert torch.allclose(predicted(unet.denoiser.model, inputs), predicted(unet.plain, inputs), **CLOSE)


def test_samples_without_an_adapter_each_are_refused(unet: Zoo) -> None:
    for holds in ([None], [None] * 4, [unet.holds[0]]):
        with pytest.raises(ValueError, match=f"2 samples and {len(holds)} adapters; name one, or None, for each"):
            stepped(unet.denoiser, holds, unet.pool, unet_of(2))


def test_rows_that_are_not_the_samples_own_are_refused(unet: Zoo) -> None:
    inputs = unet_of(3)
    others = {**inputs.others, "encoder_hidden_states": inputs.others["encoder_hidden_states"][:2]}
    with pytest.raises(ValueError, match="14 rows, which 3 samples cannot share evenly"):
        stepped(unet.denoiser, [unet.holds[0]] * 3, unet.pool, Inputs(inputs.samples, others))
