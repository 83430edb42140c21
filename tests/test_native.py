"""The native kernels against fp32 loops in torch, with every instruction set that this processor has."""

from __future__ import annotations

import copy
import ctypes
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from adapterhub.base.batch import KV_BLOCK, Batch, Segment, Span
from adapterhub.base.kv import KVCache
from adapterhub.base.model import Base, prepare_base
from adapterhub.base.native import SOURCE, Isa, best_isa, library
from adapterhub.base.native.decoder import NativeDecoder, supports
from adapterhub.base.native.structs import Matrix, address
from adapterhub.base.native.structs import Segment as NativeSegment
from adapterhub.swap.layout import Factors, Layout
from tests.tiny import CPU, FAMILIES, VOCABULARY, tiny_model

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
WIDE_HEADS = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=96,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=256,
)
ISAS = [isa for isa in Isa if library() is not None and isa <= best_isa()]


def random(*shape: int, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size).bfloat16()


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 5e-3) -> None:
    assert found.isfinite().all()
    assert (found - expected).norm() <= tolerance * expected.norm()


def test_the_sources_compile_without_a_word() -> None:
    """They are built with warnings off, and where they do not build the torch path serves: here that would show."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    command = [compiler, "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Wno-psabi", str(SOURCE / "decoder.cpp")]
    assert subprocess.run(command, capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 17, 32, 65])
@pytest.mark.parametrize(("rows", "cols"), [(64, 64), (48, 96), (80, 576), (7, 33), (130, 40)])
def test_linear_is_the_matrix_product(isa: Isa, tokens: int, rows: int, cols: int) -> None:
    weight, bias, x = random(rows, cols, seed=1), random(rows, seed=2), random(tokens, cols, seed=3)
    y = torch.full((tokens, rows), float("nan"))
    matrix = Matrix.of(weight, bias)
    library().adapterhub_linear(isa, ctypes.byref(matrix), address(x), tokens, address(y))
    close(y, x.float() @ weight.float().T + bias.float(), 1e-5)


MIXES = {
    "distinct": [(0, 1, 0), (1, 2, 1), (2, 3, 2), (3, 4, 3)],
    "identical": [(0, 9, 2)],
    "uniform with prompts": [(0, 1, 0), (1, 34, 1), (40, 41, 3)],
    "base in between": [(2, 3, 1), (5, 6, 0)],
    "base only": [],
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 17, 64])
def test_lora_is_an_fp32_loop_over_segments(isa: Isa, mix: str, rank: int) -> None:
    n_in, n_out, tokens = 96, 80, 43
    factors = [(random(rank, n_in, seed=i), random(rank, n_out, seed=i + 50, size=0.1)) for i in range(4)]
    pool = torch.cat([part.reshape(-1) for pair in factors for part in pair])
    x = random(tokens, n_in, seed=9)
    y = random(tokens, n_out, seed=10).float()
    expected = y.clone()
    offsets = [torch.tensor([-1, i * rank * (n_in + n_out)]) for i in range(4)]
    segments = (NativeSegment * len(MIXES[mix]))(
        *(NativeSegment(start, end, rank, address(offsets[i])) for start, end, i in MIXES[mix])
    )
    for start, end, i in MIXES[mix]:
        a, b = factors[i]
        expected[start:end] += (x[start:end].float() @ a.float().T) @ b.float()
    call = library().adapterhub_lora
    call(isa, address(pool), segments, len(segments), 1, address(x), n_in, address(y), n_out)
    close(y, expected, 1e-5)
    call(isa, address(pool), segments, len(segments), 0, address(x), n_in, address(y), n_out)
    close(y, expected, 1e-5)  # the block does not target linear 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dim", [16, 64, 80, 128])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("window", [0, 7])
def test_attention_is_a_softmax_over_each_tokens_context(isa: Isa, dim: int, group: int, window: int) -> None:
    contexts, kv_heads, scale = [1, 5, 16, 33, 70], 2, dim**-0.5
    keys, values = random(40 * KV_BLOCK, kv_heads, dim, seed=1), random(40 * KV_BLOCK, kv_heads, dim, seed=2)
    q = random(len(contexts), kv_heads * group, dim, seed=3)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(4)).int()
    table_at = torch.arange(0, 40, 8, dtype=torch.int32)
    until = torch.tensor(contexts, dtype=torch.int32)
    out = torch.full((len(contexts), kv_heads * group, dim), float("nan"))
    library().adapterhub_attention(
        isa, kv_heads, group, dim, dim, scale, address(q), address(keys), address(values), address(order),
        address(table_at), address(until), len(contexts), window, address(out),
    )  # fmt: skip
    for t, context in enumerate(contexts):
        slots = [int(order[8 * t + p // KV_BLOCK]) * KV_BLOCK + p % KV_BLOCK for p in range(context)]
        slots = slots[-window:] if window else slots
        for head in range(kv_heads * group):
            k, v = keys[slots, head // group].float(), values[slots, head // group].float()
            close(out[t, head], (k @ q[t, head].float() * scale).softmax(0) @ v)


# -- the whole step


@dataclass
class InPool:
    """An adapter in a pool of the test's own, as a hold gives it."""

    rank: int
    offsets: torch.Tensor
    factors: dict[str, Factors]


def in_pool(pool: torch.Tensor, start: int, layout: Layout, known: Layout, rank: int, seed: int) -> InPool:
    block = pool[start : start + layout.numel(rank)]
    block.copy_(random(len(block), seed=seed, size=0.1))
    at = [start + rank * layout.offsets[t.name] if t.name in layout.offsets else -1 for t in known.targets]
    return InPool(rank, torch.tensor(at), {t.name: f for t, f in layout.all_factors(block, rank)})


def bases(family: str) -> tuple[Base, Base]:
    """The same model in bf16, as it is served, and in fp32."""
    model = tiny_model(family)
    served = model.bfloat16()
    return prepare_base("tiny", copy.deepcopy(served), None, CPU), prepare_base("tiny", served.float(), None, CPU)


def caches(*both: Base) -> list[KVCache]:
    return [KVCache(base.kv_shapes, 1 << 20, base.dtype, CPU) for base in both]


def batch(
    kv: KVCache,
    lengths: list[int],
    contexts: list[int],
    adapters: list[InPool | None],
    pool: torch.Tensor | None = None,
) -> Batch:
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    spans, segments = [], []
    for i, (length, context, adapter) in enumerate(zip(lengths, contexts, adapters, strict=True)):
        blocks = tuple(range(4 * i, 4 * i + kv.blocks_for(context)))
        where = range(context - length, context)
        spans.append(Span(len(tokens), length, context, blocks))
        if adapter is not None:
            segments.append(Segment(len(tokens), len(tokens) + length, adapter))
        tokens += [(7 * i + 11 * p) % VOCABULARY for p in where]
        positions += where
        slots += [blocks[p // KV_BLOCK] * KV_BLOCK + p % KV_BLOCK for p in where]
    return Batch(torch.tensor(tokens), torch.tensor(positions), spans, segments, kv, torch.tensor(slots), pool)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_step_is_the_models_own_forward(family: str, isa: Isa) -> None:
    served, exact = bases(family)
    assert supports(served)
    pool = torch.zeros(1 << 17, dtype=torch.bfloat16)
    some = served.layout.subset([t.name for t in served.layout.targets if "q_proj" in t.name or "down" in t.name])
    adapters = [
        in_pool(pool, 0, served.layout, served.layout, 5, seed=1),
        None,
        in_pool(pool, 1 << 16, some, served.layout, 16, seed=2),
    ]
    kv, kv_exact, kv_torch = caches(served, exact, served)
    decoder = NativeDecoder(served, kv, isa)
    steps = [([20, 37, 1], [20, 37, 1]), ([1, 1, 30], [21, 38, 31]), ([1, 1, 1], [22, 39, 32])]
    with torch.no_grad():
        for lengths, contexts in steps:  # prompts, then a prompt's second chunk beside decoding, then decoding alone
            ends = torch.tensor(lengths).cumsum(0) - 1
            found = decoder.logits(batch(kv, lengths, contexts, adapters, pool), ends)
            expected = exact.logits(batch(kv_exact, lengths, contexts, adapters), ends)
            rounded = served.logits(batch(kv_torch, lengths, contexts, adapters), ends).float()
            # as near to the truth as torch's own bf16 forward, which rounds more often
            assert (found - expected).norm() <= 1.2 * (rounded - expected).norm()


def test_a_mixed_batch_is_each_sequence_alone() -> None:
    served, _ = bases("llama")
    pool = torch.zeros(1 << 17, dtype=torch.bfloat16)
    adapters = [in_pool(pool, i << 13, served.layout, served.layout, 4, seed=i) for i in range(5)] + [None]
    kv, alone = caches(served, served)
    decoder, other = NativeDecoder(served, kv), NativeDecoder(served, alone)
    lengths = [3, 9, 1, 17, 2, 5]
    ends = torch.tensor(lengths).cumsum(0) - 1
    with torch.no_grad():
        together = decoder.logits(batch(kv, lengths, lengths, adapters, pool), ends)
        whole = batch(alone, lengths, lengths, adapters)
        for i, span in enumerate(whole.spans):
            rows = span.rows
            segments = [Segment(0, span.length, adapters[i])] if adapters[i] is not None else []
            one = Batch(
                whole.tokens[rows].contiguous(),
                whole.positions[rows].contiguous(),
                [Span(0, span.length, span.context, span.blocks)],
                segments,
                alone,
                whole.slots[rows].contiguous(),
                pool,
            )
            assert torch.equal(other.logits(one, torch.tensor([span.length - 1]))[0], together[i])


@pytest.mark.parametrize("isa", ISAS)
def test_a_prompt_is_the_same_in_any_pieces(isa: Isa) -> None:
    served = prepare_base("tiny", tiny_model(WIDE_HEADS).bfloat16(), None, CPU)
    pool = torch.zeros(1 << 16, dtype=torch.bfloat16)
    adapter = in_pool(pool, 0, served.layout, served.layout, 4, seed=1)
    length = 61
    found = []
    for pieces in ([61], [1] * 61, [16, 16, 29], [5, 43, 1, 12], [60, 1]):
        [kv] = caches(served)
        decoder = NativeDecoder(served, kv, isa)
        done, logits = 0, []
        for piece in pieces:
            done += piece
            with torch.no_grad():
                logits.append(decoder.logits(batch(kv, [piece], [done], [adapter], pool), torch.arange(piece)))
        assert done == length
        found.append(torch.cat(logits))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_the_whole_team_works_on_every_step() -> None:
    """A step is freed and the next made where it lay: a member that took one for the other would sleep through it."""
    served, _ = bases("llama")
    [kv] = caches(served)
    others = threads()
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        decoder = NativeDecoder(served, kv)
    finally:
        torch.set_num_threads(torch_threads)
    [member] = threads() - others
    rows = batch(kv, [16] * 8, [60] * 8, [None] * 8, torch.zeros(1, dtype=torch.bfloat16))
    shares = []
    with torch.no_grad():
        for _ in range(100):  # where the machine has other work, it is a while until both have a core to themselves
            began, caller = member.cpu_seconds(), time.thread_time()
            for _ in range(20):
                decoder.logits(rows, torch.arange(128))
            shares.append((member.cpu_seconds() - began) / (time.thread_time() - caller))
            if shares[-1] > 0.2:
                return
    pytest.fail(f"it did nothing: {shares}")


@dataclass(frozen=True)
class Thread:
    """A thread of this process, as the system has it."""

    id: str

    def cpu_seconds(self) -> float:
        return int(Path(f"/proc/self/task/{self.id}/schedstat").read_text().split()[0]) / 1e9


def threads() -> set[Thread]:
    return {Thread(path.name) for path in Path("/proc/self/task").iterdir()}


def test_the_torch_path_shares_the_merged_weights() -> None:
    served, _ = bases("qwen2")
    before = {name: parameter.clone() for name, parameter in served.model.named_parameters()}
    kv, again = caches(served, served)
    NativeDecoder(served, kv)
    attention = served.model.model.layers[0].self_attn
    memory = {linear.weight.untyped_storage().data_ptr() for linear in (attention.q_proj, attention.v_proj)}
    assert len(memory) == 1
    NativeDecoder(served, again)
    assert attention.q_proj.weight.untyped_storage().data_ptr() in memory  # a second engine merges nothing anew
    assert all(torch.equal(before[name], parameter) for name, parameter in served.model.named_parameters())


def test_other_families_are_left_to_torch() -> None:
    for family in FAMILIES.keys() - {"llama", "mistral", "qwen2", "qwen3"}:
        assert not supports(prepare_base("tiny", tiny_model(family).bfloat16(), None, CPU))
    assert not supports(prepare_base("tiny", tiny_model("llama"), None, CPU))  # fp32


@pytest.mark.parametrize("family", ["gemma", "gpt_neox", "phi", "qwen2"])
def test_in_other_families_native_ops_give_what_torch_gives(family: str) -> None:
    served, exact = bases(family)
    pool = torch.zeros(1 << 17, dtype=torch.bfloat16)
    some = served.layout.subset([t.name for t in served.layout.targets][1::2])
    adapters = [in_pool(pool, 0, served.layout, served.layout, 5, seed=1), None]
    adapters.append(in_pool(pool, 1 << 16, some, served.layout, 16, seed=2))
    kv, kv_exact, kv_torch = caches(served, exact, served)
    with torch.no_grad():
        for lengths, contexts in (([20, 37, 1], [20, 37, 1]), ([1, 1, 1], [21, 38, 2])):
            ends = torch.tensor(lengths).cumsum(0) - 1
            native, plain = (batch(cache, lengths, contexts, adapters) for cache in (kv, kv_torch))
            native.pool = pool
            found, rounded = served.logits(native, ends).float(), served.logits(plain, ends).float()
            expected = exact.logits(batch(kv_exact, lengths, contexts, adapters), ends)
            assert (found - expected).norm() <= 1.2 * (rounded - expected).norm()
            assert not torch.equal(found, rounded)  # or it did not go another way
