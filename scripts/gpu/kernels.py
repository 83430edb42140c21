"""Triton's kernels: the tests' cases against fp32 loops, graphs against eager steps, and how long the kernels take.

On a CPU the kernels run in Triton's interpreter, in which time means nothing: a few small cases, to try the script.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from typing import NamedTuple

import torch
from figure import Figure

from adapterhub.base.batch import Batch, Forward, Segment, Span
from adapterhub.base.inject import merge
from adapterhub.base.kv import KVCache
from adapterhub.base.model import Base, prepare_base
from adapterhub.base.triton.decoding import DecodeSteps
from adapterhub.base.triton.tables import tables_for
from adapterhub.swap.layout import Layout, Target
from adapterhub.swap.pool import Pool
from gpu.clock import Clock
from gpu.limits import Limits, seconds
from gpu.report import Check
from tests.kernels import (
    ATTENTION_CASES,
    LORA_CASES,
    TOLERANCES,
    InPool,
    attention_error,
    forward_of,
    in_pool,
    lora_error,
)
from tests.tiny import kv_bytes, tiny_model

RANK = 16
CALLS = 20  # of a kernel in one graph, so that what the host does is not measured
_CACHES = 3  # as many bytes as fit into so many of the device's caches are read between two readings of the same
ROWS = (1, 8, 32, 64)
GRAPH_FAMILIES = ("llama", "qwen2", "gemma2")


Section = tuple[str, Callable[[], list[Figure]]]  # its title, and what measures it


class Group(NamedTuple):
    """Linears that read the same input."""

    name: str
    n_in: int
    widths: tuple[int, ...]


LLAMA_8B = (
    Group("q, k, v", 4096, (4096, 1024, 1024)),
    Group("o", 4096, (4096,)),
    Group("gate, up", 4096, (14336, 14336)),
    Group("down", 14336, (4096,)),
)
QWEN_HALF_B = (
    Group("q, k, v", 896, (896, 128, 128)),
    Group("gate, up", 896, (4864, 4864)),
    Group("down", 4864, (896,)),
)
TINY = (Group("q, k, v", 64, (64, 16, 16)),)


def kernel_checks(device: torch.device, quick: bool) -> Iterator[tuple[str, Callable[[str], Check]]]:
    """Each check's name, and what does the check of that name; none where torch serves alone, without triton."""
    if find_spec("triton") is None:
        return
    step = 12 if quick else 1
    for dtype, tolerance in TOLERANCES.items():
        kind = str(dtype).removeprefix("torch.")
        for name, cases, error in (
            ("LoRA op", LORA_CASES[::step], lora_error),
            ("attention", ATTENTION_CASES[::step], attention_error),
        ):
            found = partial(check_cases, cases, partial(error, dtype=dtype, device=device), tolerance)
            yield f"{name}, {kind}: an fp32 loop", found
    if device.type == "cuda":
        yield "LoRA op: beyond 2^31 numbers of the pool", partial(check_large_pool, device)
    for family in GRAPH_FAMILIES[:1] if quick else GRAPH_FAMILIES:
        yield f"{family}: decode steps in static buffers", partial(check_decode_steps, family, device)


def check_cases(cases: Sequence[object], error: Callable[[object], float], tolerance: float, name: str) -> Check:
    errors = [error(case) for case in cases]
    wrong = [case for case, found in zip(cases, errors, strict=True) if not found <= tolerance]  # NaN is none
    detail = f"{len(cases)} cases, the worst off by {max(errors):.2g} of its norm, {tolerance:g} allowed"
    return Check(name, not wrong, detail + "".join(f"; WRONG: {case}" for case in wrong[:3]))


def check_large_pool(device: torch.device, name: str) -> Check:
    from adapterhub.base.triton.lora import add_lora

    start, layout = 2**31 + 2**20, Layout((Target("0", 64, 48),))
    pool = torch.zeros(start + layout.numel(RANK), dtype=torch.bfloat16, device=device)
    adapter = in_pool(pool, start, layout, layout, RANK, seed=1)
    x = torch.randn(4, 64, device=device).bfloat16()
    a, b = adapter.factors["0"]
    expected = (x.float() @ a.float().T) @ b.float()
    worst = 0.0
    for spans in ([Span(i, 1, 1) for i in range(4)], [Span(0, 4, 4)]):
        forward = Forward([0] * 4, [0] * 4, [0] * 4, [0], spans, [Segment(0, 4, adapter)])
        y = torch.zeros(4, 48, dtype=torch.bfloat16, device=device)
        add_lora(y, x, pool, tables_for(forward, layout, device), 0, (48,))
        worst = max(worst, ((y.float() - expected).norm() / expected.norm()).item())
    return Check(name, worst <= TOLERANCES[torch.bfloat16], f"off by {worst:.2g} of its norm")


def check_decode_steps(family: str, device: torch.device, name: str) -> Check:
    """Padded steps of several mixes of adapters, on a GPU replayed from graphs, against forwards that are not padded;
    among them adapters and ranks that were not there when the graph was captured, in memory that was another's."""
    base = prepare_base("tiny", tiny_model(family).bfloat16(), None, device)
    if device.type == "cpu":
        merge(base.model, base.groups)  # as on a GPU
    pool = Pool(1 << 20, torch.bfloat16, device)
    kv, other = (KVCache(base.kv_shapes, kv_bytes(base, 64), base.dtype, device) for _ in range(2))
    steps, worst, context = DecodeSteps(base, kv, pool), 0.0, 0

    def adapters(ranks: Sequence[int], seed: int) -> list[InPool | None]:
        places = [i << 15 for i in range(len(ranks))]
        return [
            in_pool(pool.tensor, at, base.layout, base.layout, r, seed + at)
            for at, r in zip(places, ranks, strict=True)
        ]

    for ranks in ((3, 4, 8), (33, 2, 16)):
        a, b, c = adapters(ranks, sum(ranks))
        for mix in ([a, b, c], [None], [None, c]):
            context += 1
            forward = forward_of([1] * len(mix), [context] * len(mix), mix)
            with torch.no_grad():
                found, expected = steps.logits(forward).float(), eager(base, other, pool, forward).float()
            worst = max(worst, ((found - expected).norm() / expected.norm()).item())
    detail = f"{steps.graphs} graphs; off by {worst:.2g} of the norm of the logits"
    return Check(name, worst <= TOLERANCES[torch.bfloat16] and (steps.graphs > 0) is (device.type == "cuda"), detail)


def eager(base: Base, kv: KVCache, pool: Pool, forward: Forward) -> torch.Tensor:
    """The logits of a forward that is launched kernel by kernel and not padded."""
    tables = tables_for(forward, base.layout, base.device)
    spans, segments = forward.spans, forward.segments
    batch = Batch(tables.tokens, tables.positions, spans, segments, kv, tables.slots, pool.tensor, tables)
    return base.logits(batch, tables.wanted)


# -- figures


def measured_shapes(quick: bool) -> dict[str, tuple[Group, ...]]:
    """The linears of a layer of each base whose figures are taken; none where there is no triton."""
    if find_spec("triton") is None:
        return {}
    return {"tiny": TINY} if quick else {"Llama-3.1-8B": LLAMA_8B, "Qwen2.5-0.5B": QWEN_HALF_B}


def kernel_figures(device: torch.device, limits: Limits, quick: bool, clock: Clock) -> Iterator[Section]:
    """Each section's title, and what measures it; none where there is no triton."""
    for shape, groups in measured_shapes(quick).items():
        title = f"LoRA op of one layer, {shape}'s shape, rank {RANK}, bf16"
        works = [
            *(partial(lora_figure, device, limits, group, n) for group in groups for n in ((1, 2) if quick else ROWS)),
            *(partial(prefill_figure, device, limits, group, 8 if quick else 512) for group in groups),
        ]
        yield title, partial(some, works, clock, title)
    cases = ((2, 2, 1, 16, 20),) if quick else ((8, 4, 1, 128, 4096), (8, 4, 32, 128, 1024), (2, 7, 32, 64, 1024))
    title = "Attention of one layer, decoding, bf16"
    yield title, partial(some, [partial(attention_figure, device, limits, *case) for case in cases], clock, title)


def some(works: Sequence[Callable[[], Figure]], clock: Clock, title: str) -> list[Figure]:
    """The first, and as many others as there is time for."""
    return [work() for i, work in enumerate(works) if i == 0 or clock.may(f"some of: {title}")]


def lora_figure(device: torch.device, limits: Limits, group: Group, rows: int) -> Figure:
    """Decoding, every row with an adapter of its own."""
    return _lora_figure(device, limits, group, [1] * rows, f"{group.name}: {rows} rows, all different")


def prefill_figure(device: torch.device, limits: Limits, group: Group, tokens: int) -> Figure:
    return _lora_figure(device, limits, group, [tokens], f"{group.name}: a prompt of {tokens} tokens")


def _lora_figure(device: torch.device, limits: Limits, group: Group, lengths: list[int], name: str) -> Figure:
    from adapterhub.base.triton.lora import add_lora

    layout = Layout(tuple(Target(f"{i}", group.n_in, width) for i, width in enumerate(group.widths)))
    size, rows = layout.numel(RANK), sum(lengths)
    pool = torch.randn(len(lengths) * size, device=device).bfloat16()
    offsets = torch.tensor([RANK * layout.offsets[target.name] for target in layout.targets])
    adapters = [InPool(RANK, offsets + i * size, {}) for i in range(len(lengths))]
    tables = tables_for(forward_of(lengths, lengths, adapters), layout, device)
    x = torch.randn(rows, group.n_in, device=device).bfloat16()
    y = torch.zeros(rows, sum(group.widths), dtype=torch.bfloat16, device=device)
    pools = cycle([pool, *(pool.clone() for _ in range(_copies(device, pool.nbytes)))])
    times = kernel_seconds(device, lambda: add_lora(y, x, next(pools), tables, 0, group.widths))
    least = (pool.nbytes + x.nbytes + 2 * y.nbytes) / limits.copy * 1e6
    return Figure.of(name, "us", [s * 1e6 for s in times], f"{least:.3g} us to read and write as much")


def _copies(device: torch.device, nbytes: int) -> int:
    """How many more are to be read in turn, so that none is found in the device's cache: memory is measured."""
    if device.type == "cpu":
        return 0
    return min(CALLS - 1, _CACHES * torch.cuda.get_device_properties(device).L2_cache_size // nbytes)


def attention_figure(
    device: torch.device, limits: Limits, kv_heads: int, group: int, rows: int, dim: int, context: int
) -> Figure:
    from adapterhub.base.triton.attention import attend_paged

    each = KVCache.blocks_for(context)
    order = torch.randperm(rows * each).tolist()
    spans = [Span(i, 1, context, tuple(order[i * each : (i + 1) * each])) for i in range(rows)]
    forward = Forward([0] * rows, [0] * rows, [0] * rows, [0], spans, [])
    tables = tables_for(forward, Layout(()), device)
    keys, values = (torch.randn(16 * rows * each, kv_heads, dim, device=device).bfloat16() for _ in range(2))
    q = torch.randn(rows, kv_heads * group, dim, device=device).bfloat16().transpose(0, 1)
    times = kernel_seconds(device, lambda: attend_paged(q, keys, values, tables, dim**-0.5))
    least = rows * context * kv_heads * dim * 2 * 2 / limits.copy * 1e6
    name = f"{rows} rows of {context} tokens, {kv_heads * group} heads over {kv_heads}, {dim} long"
    return Figure.of(name, "us", [s * 1e6 for s in times], f"{least:.3g} us to read as much")


def kernel_seconds(device: torch.device, work: Callable[[], object]) -> list[float]:
    """How long one call takes on the device, without what the host does to launch it."""
    if device.type == "cpu":
        return seconds(device, work, 2)
    for _ in range(2):  # compiles
        work()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            work()
    return [s / CALLS for s in seconds(device, graph.replay)]


def step_figures(base: Base, limits: Limits, context: int) -> list[Figure]:
    """One decode step from tokens to logits, without sampling and scheduling: replayed, and kernel by kernel."""
    size = base.layout.numel(RANK)
    pool = Pool(ROWS[-1] * size * base.dtype.itemsize, base.dtype, base.device)
    pool.tensor.normal_(0, 0.02)
    offsets = torch.tensor([RANK * base.layout.offsets[target.name] for target in base.layout.targets])
    adapters = [InPool(RANK, offsets + i * size, {}) for i in range(ROWS[-1])]
    each = KVCache.blocks_for(context)
    kv = KVCache(base.kv_shapes, kv_bytes(base, ROWS[-1] * each), base.dtype, base.device)
    ways = {"graph": DecodeSteps(base, kv, pool), "eager": DecodeSteps(base, kv, pool, capture=False)}
    figures = []
    for rows in ROWS:
        alone = 0.0
        for kind, chosen in (("base", [None] * rows), ("all different", adapters[:rows])):
            forward = spread(forward_of([1] * rows, [context] * rows, chosen), each)
            for way, steps in ways.items():
                with torch.no_grad():
                    times = [s * 1e3 for s in seconds(base.device, partial(steps.logits, forward))]
                numbers = len(forward.segments) * size + kv_numel(base) * rows * context
                read = bytes_of_step(base) + numbers * base.dtype.itemsize
                figure = Figure.of(
                    f"{rows} rows, {kind}, {way}", "ms", times, f"{read / limits.copy * 1e3:.3g} ms to read"
                )
                alone = alone or figure.median
                note = f"{figure.note} base, adapters and context; {figure.median / alone:.2f} times base's graph"
                figures.append(Figure.of(figure.name, "ms", times, note))
    return figures


def bytes_of_step(base: Base) -> int:
    """Bytes of the base that a step reads: of an input embedding that is not the output's as well, a few rows alone."""
    embedding, head = base.model.get_input_embeddings().weight, base.model.get_output_embeddings().weight
    return base.nbytes - (0 if embedding is head else embedding.nbytes)


def kv_numel(base: Base) -> int:
    """Numbers that one token keeps in all layers."""
    return sum(shape.numel for shape in base.kv_shapes.values())


def spread(forward: Forward, each: int) -> Forward:
    """The same with `each` KV blocks for every sequence, none of them another's."""
    spans = [
        Span(span.start, 1, span.context, tuple(range(i * each, (i + 1) * each)))
        for i, span in enumerate(forward.spans)
    ]
    slots = [span.blocks[-1] * 16 + (span.context - 1) % 16 for span in spans]
    return forward._replace(spans=spans, slots=slots)
