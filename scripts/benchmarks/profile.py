"""Where the time of a decode step goes: 16 rows of 42 tokens of context, on the base and with 16 adapters of rank 16 on
all linears. One forward in this process, what it takes less without one of its parts, and what it reads at the rate at
which this machine reads memory; then a step of a server with as many streams, and what is left for everything else."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from figure import Figure

from adapterhub.base.kv import KVCache
from adapterhub.base.native.decoder import NativeDecoder
from adapterhub.swap.pool import Pool
from benchmarks.limits import memory_bandwidth
from benchmarks.load import Load
from benchmarks.peers import Setting, prompt_ids
from benchmarks.server import RANK, base, import_adapters, server
from tests.kernels import InPool, batch
from tests.tiny import kv_bytes

ROWS, CONTEXT, SHORT = 16, 42, 1
ROUNDS = 40
TOKENS, SERVER_ROUNDS = 64, 3
BASE, ALL = "base", f"{ROWS} adapters"


def run(_: Setting) -> list[Figure]:
    bandwidths = [memory_bandwidth()]
    model = base()
    layout, item = model.layout, model.dtype.itemsize
    pool = Pool(ROWS * layout.numel(RANK) * item, model.dtype, model.device)
    pool.tensor.normal_(0, 0.02)
    offsets = torch.tensor([RANK * layout.offsets[target.name] for target in layout.targets])
    adapters = [InPool(RANK, offsets + i * layout.numel(RANK), {}) for i in range(ROWS)]
    kv = KVCache(model.kv_shapes, kv_bytes(model, 4 * ROWS), model.dtype, model.device)
    decoder = NativeDecoder(model, kv)

    def forward(chosen: Sequence[InPool | None], context: int, wanted: int) -> Callable[[], object]:
        step = batch(kv, [1] * ROWS, [context] * ROWS, list(chosen), pool.tensor)
        return partial(decoder.logits, step, torch.arange(wanted))

    none: list[InPool | None] = [None] * ROWS
    times = _in_turns(
        {
            BASE: forward(none, CONTEXT, ROWS),
            ALL: forward(adapters, CONTEXT, ROWS),
            "no context": forward(none, SHORT, ROWS),
            "no logits": forward(none, CONTEXT, 0),
        }
    )
    bandwidths.append(memory_bandwidth())
    bandwidth = max(bandwidths)  # others may have had the machine meanwhile
    cached = sum(shape.numel for shape in model.kv_shapes.values()) * ROWS * CONTEXT * item
    attention, output = _less(times[BASE], times["no context"]), _less(times[BASE], times["no logits"])
    parts = [
        ("LoRA", _less(times[ALL], times[BASE]), pool.tensor.nbytes),
        ("attention", attention, cached),
        ("output layer", output, model.model.get_output_embeddings().weight.nbytes),
        (
            "linears, norms and the rest",
            _less(_less(times[BASE], attention), output),
            sum(target.n_in * target.n_out for target in layout.targets) * item,
        ),
    ]
    figures = [Figure.of(f"one forward, {kind}", "ms", times[kind]) for kind in (BASE, ALL)]
    for name, taken, nbytes in parts:
        note = f"{nbytes / 1e6:.0f} MB, which take {nbytes / bandwidth * 1e3:.2g} ms to read"
        figures.append(Figure.of(f"of it {name}", "ms", taken, note))
    for kind, steps in _server_steps().items():
        left = statistics.median(steps) - statistics.median(times[kind])
        note = f"{left:.2g} ms beside the forward: scheduling, sampling, text, HTTP, prompts"
        figures.append(Figure.of(f"a step of the server, {kind}", "ms", steps, note))
    return [*figures, Figure.of("memory bandwidth", "GB/s", [b / 1e9 for b in bandwidths])]


def _less(whole: list[float], without: list[float]) -> list[float]:
    """What the part takes that is not in `without`, round by round."""
    return [w - o for w, o in zip(whole, without, strict=True)]


def _in_turns(works: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Milliseconds of each, round by round, after two to warm up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(ROUNDS + 2):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if turn > 1:
                times[name].append((time.perf_counter() - began) * 1e3)
    return times


def _server_steps() -> dict[str, list[float]]:
    """Milliseconds of a step, from the tokens that all streams get in a second."""
    with server() as running:
        models = [adapter["model"] for adapter in import_adapters(running, ROWS)]
        load, prompt = Load(running.url, running.key), prompt_ids()
        found: dict[str, list[float]] = {BASE: [], ALL: []}
        for turn in range(SERVER_ROUNDS + 1):
            for kind, asked in ((BASE, [running.base] * ROWS), (ALL, models)):
                done = load.round(asked, TOKENS, prompt)
                if turn:
                    found[kind].append(ROWS / done.rate * 1e3)
    return found
