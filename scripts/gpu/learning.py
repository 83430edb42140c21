"""Training by Triton's kernels: the tests' cases against autograd in fp32, pieces of training against the torch path,
and how long the kernels take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from unittest import mock

import numpy as np
import torch
from figure import Figure

from adapterhub.base import varlen
from adapterhub.base.inject import merge
from adapterhub.base.model import Base, prepare_base
from adapterhub.train import packing
from adapterhub.train.dataset import Example
from adapterhub.train.packing import Forward, Item
from adapterhub.train.parameters import Parameters
from gpu.clock import Clock
from gpu.kernels import RANK, Group, Section, check_cases, kernel_seconds, measured_shapes
from gpu.limits import Limits
from gpu.report import Check
from tests.kernels import (
    LEARNING_CASES,
    TOLERANCES,
    LearningCase,
    far_learning_error,
    learning_error,
    learning_launches,
)
from tests.tiny import VOCABULARY, tiny_model

FAMILIES = ("llama", "qwen2", "gemma2")
PIECE_TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}  # over all layers, forth and back
ROWS = 1024  # of a piece
JOBS = 8
Part = tuple[Parameters | None, list[Item]]


def learning_checks(device: torch.device, quick: bool) -> Iterator[tuple[str, Callable[[str], Check]]]:
    """Each check's name, and what does the check of that name; none where there is no triton."""
    if find_spec("triton") is None:
        return
    cases = LEARNING_CASES[:: 5 if quick else 1]
    for dtype, tolerance in TOLERANCES.items():
        error = partial(learning_error, dtype=dtype, device=device)
        name = f"LoRA op of training, {_name(dtype)}: outputs and gradients are autograd's in fp32"
        yield name, partial(check_cases, cases, error, tolerance)
    if device.type == "cuda":
        yield "LoRA op of training: jobs further apart than 2^31 numbers", partial(check_far_jobs, device)
    yield "attention of training", partial(check_attention, device)
    for family in FAMILIES[:1] if quick else FAMILIES:
        for dtype in PIECE_TOLERANCES:
            name = f"{family}, {_name(dtype)}: a piece of several jobs is the torch path's in fp32"
            yield name, partial(check_piece, family, dtype, device)


def check_far_jobs(device: torch.device, name: str) -> Check:
    error = far_learning_error(device)
    return Check(name, error <= TOLERANCES[torch.float16], f"off by {error:.2g} of its norm")


def check_piece(family: str, dtype: torch.dtype, device: torch.device, name: str) -> Check:
    """Log probabilities and gradients of jobs of all kinds, forward and backward through all layers."""
    with mock.patch.object(packing, "usable", return_value=False):
        wide = _base(family, torch.float32, device)
        expected = _learn(wide, _jobs(wide))
    narrow = _base(family, dtype, device)
    with mock.patch.object(packing, "usable", return_value=True):
        found = _learn(narrow, _jobs(narrow))
    errors = [_error(f, e) for f, e in zip(found, expected, strict=True)]
    worst, allowed = float(torch.tensor(errors).amax()), PIECE_TOLERANCES[dtype]
    detail = f"{len(errors) - 1} jobs, the worst off by {worst:.2g} of its norm, {allowed:g} allowed"
    return Check(name, worst <= allowed, detail)  # NaN is not


def check_attention(device: torch.device, name: str) -> Check:
    """Where torch's `varlen_attn` is not right, sequences are attended to one by one: slower, and as right."""
    told = []
    for shape, (heads, kv_heads, dim) in {"Qwen2.5-0.5B": (14, 2, 64), "Llama-3.1-8B": (32, 8, 128)}.items():
        q, k, v = (torch.zeros(n, 1, dim, dtype=torch.bfloat16, device=device) for n in (heads, kv_heads, kv_heads))
        for window in (None, 64):
            way = "in one launch" if varlen.usable(q, k, v, window) else "one by one"
            told.append(f"{shape}'s shape{' with a window' if window else ''} {way}")
    return Check(name, True, ", ".join(told))


def _base(family: str, dtype: torch.dtype, device: torch.device) -> Base:
    base = prepare_base("tiny", tiny_model(family).to(dtype), None, device)
    if device.type == "cpu":
        merge(base.model, base.groups)  # as on a GPU
    return base


def _jobs(base: Base) -> list[Part]:
    """Ranks, targets and lengths of all kinds, with rows of no adapter between them."""
    names = [target.name for target in base.layout.targets]
    return [
        (_parameters(base, 16, names, seed=1), [_item(50, 0), _item(33, 1)]),
        (None, [_item(21, 2)]),
        (_parameters(base, 5, names[1::2], seed=2), [_item(7, 3)]),
        (_parameters(base, 64, names[2:], seed=3), [_item(2, 4), _item(6, 5)]),
    ]


def _parameters(base: Base, rank: int, names: list[str], seed: int) -> Parameters:
    made = Parameters(base.layout.subset(names), rank, 2.0, base.dtype, base.device)
    generator = torch.Generator().manual_seed(seed)
    made.block.copy_(torch.randn(made.block.shape, generator=generator) * 0.1)
    made.refresh()
    return made


def _item(length: int, seed: int) -> Item:
    tokens = np.random.default_rng((length, seed)).integers(3, VOCABULARY, length)
    return (Example(tokens, np.arange(length) > 0),)


def _learn(base: Base, parts: list[Part]) -> list[torch.Tensor]:
    """Log probabilities of all learned tokens, and the gradients of every job for a loss that weighs them."""
    forward = Forward(base)
    logprobs = torch.cat([outcome.logprobs for outcome in forward(parts, record=True)])
    weights = torch.linspace(0.5, 1.5, len(logprobs), device=base.device)
    forward.backward(-(logprobs * weights).sum())
    return [logprobs.detach(), *(job.gradient.clone() for job, _ in parts if job is not None)]


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- figures


def learning_figures(device: torch.device, limits: Limits, quick: bool, clock: Clock) -> Iterator[Section]:
    """Each section's title, and what measures it; none where there is no triton."""
    for shape, groups in measured_shapes(quick).items():
        title = f"LoRA op of one layer in training, {shape}'s shape, rank {RANK}, bf16"
        yield title, partial(_shape_figures, device, limits, groups, 32 if quick else ROWS, clock, title)


def _shape_figures(
    device: torch.device, limits: Limits, groups: tuple[Group, ...], rows: int, clock: Clock, title: str
) -> list[Figure]:
    return [
        figure
        for group in groups
        for jobs in (1, JOBS)
        if (group, jobs) == (groups[0], 1) or clock.may(f"some of: {title}")
        for figure in _group_figures(device, limits, group, rows, jobs)
    ]


def _group_figures(device: torch.device, limits: Limits, group: Group, rows: int, jobs: int) -> Iterator[Figure]:
    """Forward and backward of one group of linears for a piece of so many rows, which so many jobs share."""
    each, width = rows // jobs, sum(group.widths)
    case = LearningCase(
        tuple((i * each, (i + 1) * each) for i in range(jobs)), (RANK,) * jobs, group.n_in, group.widths, rows,
        lacking=((),) * jobs,
    )  # fmt: skip
    launches = learning_launches(case, torch.bfloat16, device)
    numbers = jobs * RANK * (len(group.widths) * group.n_in + width)  # of all factors
    products = 2 * rows * RANK * (len(group.widths) * group.n_in + width)
    x, y = rows * group.n_in, rows * width
    forward, backward = ("shrink", "expand"), ("shrink_back", "expand_back", "add_gradients")
    # forward reads x, A, B and adds to y; backward reads y's gradient and x and all factors, writes x's gradient, and
    # adds to fp32 gradients of all factors
    for way, names, nbytes, operations in (
        ("forward", forward, 2 * (x + 2 * y + numbers), products),
        ("backward", backward, 2 * (2 * x + y + numbers) + 8 * numbers, 2 * products),
    ):
        times = kernel_seconds(device, lambda names=names: [launches[name]() for name in names])
        least = max(nbytes / limits.copy, operations / limits.product) * 1e6
        many = "one job" if jobs == 1 else f"{jobs} jobs"
        note = f"{least:.3g} us to read and write as much, or to multiply"
        yield Figure.of(f"{group.name}: {way}, {rows} rows of {many}", "us", [s * 1e6 for s in times], note)
