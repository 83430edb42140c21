"""What every backend of the LoRA op and of attention must compute: cases, fp32 loops, steps with adapters in a pool.

Needs torch alone, so that `scripts/gpu_check` goes through the same cases on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from adapterhub.base.batch import KV_BLOCK, Batch, Forward, Segment, Span
from adapterhub.base.kv import KVCache
from adapterhub.base.triton.learning import LearningBatches
from adapterhub.base.triton.tables import tables_for
from adapterhub.swap.layout import Factors, Layout, Target
from adapterhub.train.parameters import Parameters

_VOCABULARY = 160  # of the models in `tiny.py`
RANKS = [1, 3, 8, 16, 17, 64]
HEAD_DIMS = [16, 64, 80, 128]
GROUPS = [1, 3, 8]  # heads that share a key head
CONTEXTS = [1, 5, 16, 33, 70]
WINDOW = 7

MIXED_ROWS = 43
MIXES = {  # rows [start, end) of which adapter
    "distinct": [(0, 1, 0), (1, 2, 1), (2, 3, 2), (3, 4, 3)],
    "identical": [(0, 9, 2)],
    "uniform with prompts": [(0, 1, 0), (1, 34, 1), (40, 41, 3)],
    "base in between": [(2, 3, 1), (5, 6, 0)],
    "base only": [],
}


def random(*shape: int, seed: int = 0, size: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 5e-3) -> None:
    assert found.isfinite().all()
    assert (found - expected).norm() <= tolerance * expected.norm()


@dataclass
class InPool:
    """An adapter in a pool of the test's own, as a hold gives it."""

    rank: int
    offsets: torch.Tensor
    factors: dict[str, Factors]


def in_pool(pool: torch.Tensor, start: int, layout: Layout, known: Layout, rank: int, seed: int) -> InPool:
    block = pool[start : start + layout.numel(rank)]
    block.copy_(random(len(block), seed=seed, size=0.1, dtype=pool.dtype))
    at = [start + rank * layout.offsets[t.name] if t.name in layout.offsets else -1 for t in known.targets]
    return InPool(rank, torch.tensor(at), {t.name: f for t, f in layout.all_factors(block, rank)})


def forward_of(lengths: Sequence[int], contexts: Sequence[int], adapters: Sequence[InPool | None]) -> Forward:
    """Sequence i ends in `lengths[i]` new tokens, has `contexts[i]` in all, and lies in KV blocks 4 i and after."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    spans, segments = [], []
    for i, (length, context, adapter) in enumerate(zip(lengths, contexts, adapters, strict=True)):
        blocks = tuple(range(4 * i, 4 * i + KVCache.blocks_for(context)))
        where = range(context - length, context)
        spans.append(Span(len(tokens), length, context, blocks))
        if adapter is not None:
            segments.append(Segment(len(tokens), len(tokens) + length, adapter))
        tokens += [(7 * i + 11 * p) % _VOCABULARY for p in where]
        positions += where
        slots += [blocks[p // KV_BLOCK] * KV_BLOCK + p % KV_BLOCK for p in where]
    return Forward(tokens, positions, slots, [span.rows.stop - 1 for span in spans], spans, segments)


def batch(
    kv: KVCache,
    lengths: list[int],
    contexts: list[int],
    adapters: list[InPool | None],
    pool: torch.Tensor | None = None,
) -> Batch:
    forward = forward_of(lengths, contexts, adapters)
    return Batch(
        torch.tensor(forward.tokens),
        torch.tensor(forward.positions),
        forward.spans,
        forward.segments,
        kv,
        torch.tensor(forward.slots),
        pool,
    )


# -- Triton's kernels against fp32 loops


class LoraCase(NamedTuple):
    """Linears that read the same input, and which rows which of four adapters changes. Decoding, every row is a
    sequence of its own; else all are one prompt. The base has another linear before them."""

    mix: str
    ranks: tuple[int, int, int, int]
    n_in: int = 96
    widths: tuple[int, ...] = (80, 40, 40)
    decoding: bool = True
    lacking: tuple[int, ...] = ()  # linears that adapter 0 lacks


class AttentionCase(NamedTuple):
    """Sequences with so many new tokens, which end contexts of so many; values are as long as keys, or longer."""

    dim: int
    group: int
    lengths: tuple[int, ...]
    contexts: tuple[int, ...]
    window: int | None = None
    softcap: float | None = None
    more_values: int = 0
    kv_heads: int = 2


TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
_ONES = (1,) * len(CONTEXTS)
_CONTEXTS = tuple(CONTEXTS)
LORA_CASES = [
    *(LoraCase(mix, (rank,) * 4, decoding=False) for mix in MIXES for rank in RANKS),
    *(LoraCase(mix, (rank,) * 4) for mix in ("distinct", "base in between") for rank in RANKS),
    *(LoraCase(mix, (1, 17, 64, 256), decoding=decoding) for mix in MIXES for decoding in (True, False)),
    # a long input, which is summed in parts; odd sizes, which are not aligned; linears of very different widths
    *(
        LoraCase(mix, (3, 16, 17, 40), *shape, decoding=decoding)
        for shape in ((1100, (72,)), (5000, (24, 8)), (33, (7, 130)), (1033, (9,)), (64, (1032, 8, 520)))
        for mix, decoding in (("distinct", True), ("uniform with prompts", False))
    ),
    *(LoraCase("distinct", (4,) * 4, decoding=d, lacking=lacking) for d in (True, False) for lacking in ((1,), (0, 2))),
]
ATTENTION_CASES = [
    *(AttentionCase(dim, group, _ONES, _CONTEXTS) for dim in HEAD_DIMS for group in GROUPS),
    *(AttentionCase(dim, 3, _ONES, _CONTEXTS, WINDOW) for dim in HEAD_DIMS),
    *(
        AttentionCase(dim, group, (1, 5, 70, 20), (1, 5, 70, 90), window)
        for dim, group in ((16, 1), (64, 7), (80, 3), (128, 8))
        for window in (None, WINDOW)
    ),
    AttentionCase(16, 24, (1, 5, 70, 20), (1, 5, 70, 90), 40),
    AttentionCase(16, 4, _ONES, (1, 500, 129, 33, 16)),
    AttentionCase(16, 4, (1,) * 70, tuple(range(1, 71)), WINDOW),  # enough rows that none goes in parts
    *(AttentionCase(32, 2, _ONES, _CONTEXTS, window, 2.0) for window in (None, WINDOW)),
    AttentionCase(32, 2, (1, 3, 16, 9, 70), _CONTEXTS, WINDOW, 2.0),
    AttentionCase(16, 1, (1,) * 24, tuple(range(3, 75, 3))),  # as many rows and key heads as fill a device unevenly
    AttentionCase(16, 2, (1,) * 8, (1, 5, 16, 33, 70, 129, 300, 2), kv_heads=3),
    *(AttentionCase(48, 2, lengths, _CONTEXTS, more_values=16) for lengths in (_ONES, (1, 3, 16, 9, 70))),
]


def lora_error(case: LoraCase, dtype: torch.dtype, device: torch.device) -> float:
    """How far the kernels' result is from the fp32 loop's, of its norm."""
    from adapterhub.base.triton.lora import add_lora

    layout = Layout(
        (Target("before", 8, 8), *(Target(f"{i}", case.n_in, width) for i, width in enumerate(case.widths)))
    )
    pool = torch.zeros(sum(layout.numel(rank) + 8 for rank in case.ranks), dtype=dtype)
    adapters, at = [], 0
    for i, rank in enumerate(case.ranks):
        lacking = {f"{m}" for m in case.lacking} if i == 0 else set()
        targets = layout.subset(t.name for t in layout.targets if t.name not in lacking)
        adapters.append(in_pool(pool, at, targets, layout, rank, seed=i))
        at += targets.numel(rank) + -targets.numel(rank) % 8
    x, y = (
        random(MIXED_ROWS, case.n_in, seed=9, dtype=dtype),
        random(MIXED_ROWS, sum(case.widths), seed=10, dtype=dtype),
    )
    segments = [Segment(start, end, adapters[i]) for start, end, i in MIXES[case.mix]]
    expected = y.float().clone()
    for segment in segments:
        for i, part in enumerate(expected[segment.rows].split(case.widths, 1)):
            if f"{i}" in segment.adapter.factors:
                a, b = segment.adapter.factors[f"{i}"]
                part += (x[segment.rows].float() @ a.float().T) @ b.float()
    rows = range(MIXED_ROWS)
    spans = [Span(row, 1, 1) for row in rows] if case.decoding else [Span(0, MIXED_ROWS, MIXED_ROWS)]
    forward = Forward([0 for _ in rows], [0 for _ in rows], [0 for _ in rows], [0], spans, segments)
    tables = tables_for(forward, layout, device)
    y = y.to(device)
    if segments:
        add_lora(y, x.to(device), pool.to(device), tables, 1, case.widths)
    return _error(y, expected)


class LearningCase(NamedTuple):
    """Jobs that learn linears which read the same input, and the rows [start, end) that each has, of `total`. The base
    has another linear before them. Job i lacks the linears `lacking[i]`."""

    jobs: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...]
    n_in: int = 96
    widths: tuple[int, ...] = (80, 40, 40)
    total: int = 80
    lacking: tuple[tuple[int, ...], ...] = ((), (), ())


_THREE_JOBS = ((0, 3), (3, 70), (71, 80))  # one of more than a tile, and a row of the base alone
LEARNING_CASES = [
    *(LearningCase(_THREE_JOBS, ranks) for ranks in ((1, 8, 16), (17, 64, 3), (40, 1, 64))),
    *(LearningCase(_THREE_JOBS, (3, 16, 40), *shape) for shape in ((33, (7, 130)), (64, (520, 8)))),
    *(LearningCase(((0, 80),), (rank,), 64, (64,)) for rank in RANKS),
    *(LearningCase(((0, 2), (3, 9)), (3, 40), *shape, 9) for shape in ((4200, (72,)), (24, (4200, 8)))),  # in parts
    LearningCase(((0, 70), (70, 70), (70, 80)), (8, 8, 8)),  # one that has no rows
    LearningCase(_THREE_JOBS, (4, 5, 6), lacking=((1,), (0, 2), ())),
    LearningCase(_THREE_JOBS, (4, 5, 6), lacking=((0, 1, 2), (2,), (2,))),  # nobody learns the last
]


def learning_error(case: LearningCase, dtype: torch.dtype, device: torch.device) -> float:
    """How far the kernels' y, gradient of x, and gradients of A and B of each job and linear are from fp32 autograd's,
    of its norm: the worst of them."""
    layout = layout_of(case)
    jobs = jobs_of(case, layout, dtype, device)
    expected = learned_by_autograd(case, layout, jobs, dtype)
    found = learned_by_kernels(case, layout, jobs, dtype)
    errors = [_error(f, e) for f, e in zip(found, expected, strict=True) if e.any() or f.any()]
    return float(torch.tensor(errors).amax())  # NaN if any is


def layout_of(case: LearningCase) -> Layout:
    linears = (Target(f"{i}", case.n_in, width) for i, width in enumerate(case.widths))
    return Layout((Target("before", 8, 8), *linears))


def jobs_of(case: LearningCase, layout: Layout, dtype: torch.dtype, device: torch.device) -> list[Parameters]:
    jobs = []
    for i, (rank, lacking) in enumerate(zip(case.ranks, case.lacking, strict=False)):
        targets = layout.subset(t.name for t in layout.targets if t.name not in {f"{m}" for m in lacking})
        job = Parameters(targets, rank, 0.5, dtype, device)
        job.block.copy_(random(len(job.block), seed=i, size=0.2, dtype=torch.float32))
        job.gradient.fill_(_BEFORE)
        job.refresh()
        jobs.append(job)
    return jobs


_BEFORE = 0.25  # what every gradient holds already


def learned_by_kernels(
    case: LearningCase, layout: Layout, jobs: list[Parameters], dtype: torch.dtype
) -> list[torch.Tensor]:
    """y, the gradient of x, and what was added to the gradient of A and B of each job and linear, for a loss whose
    gradient of y is random."""
    from adapterhub.base.triton.backward import learn_lora

    x, y, slope = (part.to(jobs[0].block.device) for part in _learning_numbers(case, dtype))
    x.requires_grad_()
    out = learn_lora(y, x, _learning_batch(case, layout, jobs), 1, case.widths)
    (x_gradient,) = torch.autograd.grad(out, x, slope) if out.requires_grad else (torch.zeros_like(x),)
    gradients = [part - _BEFORE for job in jobs for pair in job.gradients.values() for part in pair]
    return [out.detach(), x_gradient, *gradients]


def learned_by_autograd(
    case: LearningCase, layout: Layout, jobs: list[Parameters], dtype: torch.dtype
) -> list[torch.Tensor]:
    """The same by torch, in fp32."""
    x, y, slope = (part.float() for part in _learning_numbers(case, dtype))
    x.requires_grad_()
    leaves: list[torch.Tensor] = []
    for (start, end), job in zip(case.jobs, jobs, strict=True):
        for name, factors in job.factors.items():
            a, b = (part.detach().cpu().float().requires_grad_() for part in factors)
            leaves += [a, b]
            if name != "before":
                left, width = sum(case.widths[: int(name)]), case.widths[int(name)]
                edges = (left, y.shape[1] - left - width, start, case.total - end)
                y = y + torch.nn.functional.pad((x[start:end] @ a.T) @ b, edges)
    found = torch.autograd.grad(y, [x, *leaves], slope, allow_unused=True, materialize_grads=True)
    return [y.detach(), *found]


@dataclass(eq=False)
class Far:
    """A job whose factors and gradients may lie beyond what 32 bits count."""

    factors: dict[str, Factors]
    gradients: dict[str, Factors]


def far_learning_error(device: torch.device) -> float:
    """`learning_error`, in fp16, of two jobs that are further from each other than 32 bits count."""
    from adapterhub.base.triton.backward import learn_lora

    n_in, n_out, rank, dtype = 16, 8, 2, torch.float16
    layout = Layout((Target("0", n_in, n_out),))
    numel, far = layout.numel(rank), 2**31 + 2**20
    flat, gradient = (_sparse(far + numel, kind, device) for kind in (dtype, torch.float32))
    jobs = []
    for start, seed in ((0, 1), (far, 2)):
        flat[start : start + numel] = random(numel, seed=seed, dtype=dtype).to(device)
        gradient[start : start + numel] = 0
        jobs.append(Far(*({"0": layout.factors(f[start : start + numel], rank, "0")} for f in (flat, gradient))))
    x, slope = (random(4, n, seed=n, dtype=dtype).to(device) for n in (n_in, n_out))
    y = torch.zeros(4, n_out, dtype=dtype, device=device)
    segments = [Segment(0, 2, jobs[0]), Segment(2, 4, jobs[1])]
    laid = Forward([0] * 4, [0] * 4, [], [0], [Span(0, 4, 4)], segments)
    batch = LearningBatches(layout, device).batch(laid, record=True, give_way=None)
    x.requires_grad_()
    out = learn_lora(y, x, batch, 0, (n_out,))
    (x_gradient,) = torch.autograd.grad(out, x, slope)
    errors = []
    for segment, job in zip(segments, jobs, strict=True):
        rows, (a, b) = segment.rows, (factor.float() for factor in job.factors["0"])
        wide, up = x[rows].detach().float(), slope[rows].float()
        errors += [
            _error(out[rows].detach(), ((wide @ a.T) @ b).cpu()),
            _error(x_gradient[rows], ((up @ b.T) @ a).cpu()),
            _error(job.gradients["0"].a, ((up @ b.T).T @ wide).cpu()),
            _error(job.gradients["0"].b, ((wide @ a.T).T @ up).cpu()),
        ]
    return float(torch.tensor(errors).amax())


def _sparse(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Of which the system gives only the pages that are written to; on a GPU, all of it."""
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(numel * dtype.itemsize, np.uint8)).view(dtype)
    return torch.empty(numel, dtype=dtype, device=device)


def learning_launches(case: LearningCase, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], object]]:
    """What a forward and its backward launch, by name, in this order: to be timed, each as often as one likes."""
    from adapterhub.base.triton import tiles
    from adapterhub.base.triton.finding import Linears

    layout, linears = layout_of(case), Linears(1, case.n_in, case.widths)
    batch = _learning_batch(case, layout, jobs_of(case, layout, dtype, device))
    pool, tables, gradients = batch.pool, batch.tables, batch.gradients
    assert pool is not None
    assert tables is not None
    assert gradients is not None
    x, y, slope = (part.to(device) for part in _learning_numbers(case, dtype))
    x_gradient = torch.zeros_like(x)
    low = tiles.shrink(x, pool, tables, linears, learning=True)
    middle = tiles.shrink_back(slope, pool, tables, linears)
    kept, kept_back = (torch.zeros_like(low[0], dtype=dtype) for _ in range(2))
    return {
        "shrink": lambda: tiles.shrink(x, pool, tables, linears, learning=True),
        "expand": lambda: tiles.expand(y, low, pool, tables, linears, kept),
        "shrink_back": lambda: tiles.shrink_back(slope, pool, tables, linears),
        "expand_back": lambda: tiles.expand_back(x_gradient, middle, pool, tables, linears, kept_back),
        # with the jobs, of whose memory the others have nothing but the address
        "add_gradients": lambda _jobs=batch.segments: tiles.add_gradients(
            gradients, x, slope, kept, kept_back, tables, linears
        ),
    }


def _learning_batch(case: LearningCase, layout: Layout, jobs: list[Parameters]) -> Batch:
    segments = [Segment(start, end, job) for (start, end), job in zip(case.jobs, jobs, strict=True)]
    zeros = [0] * case.total
    forward = Forward(zeros, zeros, [], [0], [Span(0, case.total, case.total)], segments)
    return LearningBatches(layout, jobs[0].block.device).batch(forward, record=True, give_way=None)


def _learning_numbers(case: LearningCase, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, y before the adapters, and the gradient of y after them."""
    width = sum(case.widths)
    x, y = random(case.total, case.n_in, seed=20, dtype=dtype), random(case.total, width, seed=21, dtype=dtype)
    return x, y, random(case.total, width, seed=22, dtype=dtype)


def attention_error(case: AttentionCase, dtype: torch.dtype, device: torch.device) -> float:
    """How far the kernels' result is from the fp32 loop's, of its norm. What the sequences' blocks do not hold yet, and
    what is in nobody's, is NaN."""
    from adapterhub.base.triton.attention import attend_paged, write_kv

    kv_heads, heads, scale = case.kv_heads, case.kv_heads * case.group, case.dim**-0.5
    count = sum(map(KVCache.blocks_for, case.contexts)) + 3
    order = torch.randperm(count, generator=torch.Generator().manual_seed(4)).tolist()
    keys = random(count * KV_BLOCK, kv_heads, case.dim, seed=1, dtype=dtype)
    values = random(count * KV_BLOCK, kv_heads, case.dim + case.more_values, seed=2, dtype=dtype)
    spans, slots, held, at = [], [], [], 0
    for length, context in zip(case.lengths, case.contexts, strict=True):
        blocks, order = order[: KVCache.blocks_for(context)], order[KVCache.blocks_for(context) :]
        spans.append(Span(at, length, context, tuple(blocks)))
        places = [blocks[p // KV_BLOCK] * KV_BLOCK + p % KV_BLOCK for p in range(context)]
        held.append(places)
        slots += places[-length:]
        at += length
    q = random(at, heads, case.dim, seed=3, dtype=dtype).transpose(0, 1)
    expected = torch.empty(at, heads, values.shape[2])
    for span, places in zip(spans, held, strict=True):
        for row in range(span.length):
            until = span.context - span.length + row + 1
            seen = places[:until][-case.window :] if case.window else places[:until]
            k, v = (part[seen].float().repeat_interleave(case.group, 1) for part in (keys, values))
            scores = torch.einsum("hd,shd->hs", q[:, span.start + row].float(), k) * scale
            if case.softcap:
                scores = torch.tanh(scores / case.softcap) * case.softcap
            expected[span.start + row] = torch.einsum("hs,shd->hd", scores.softmax(-1), v)
    new = [part[slots].transpose(0, 1).to(device) for part in (keys, values)]
    before = torch.tensor(sorted({place for places in held for place in places} - set(slots)), dtype=torch.long)
    caches = []
    for part in (keys, values):
        cache = torch.full_like(part, float("nan"))
        cache[before] = part[before]
        caches.append(cache.to(device))
    forward = Forward([0] * at, [0] * at, slots, [0], spans, [])
    tables = tables_for(forward, Layout(()), device)
    write_kv(caches[0], caches[1], new[0], new[1], tables.slots)
    out = attend_paged(q.to(device), caches[0], caches[1], tables, scale, case.window, case.softcap)
    return _error(out, expected)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """NaN when anything that was found is no number."""
    return ((found.float().cpu() - expected).norm() / expected.norm()).item()
