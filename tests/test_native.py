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
from adapterhub.base.native.decoder import NativeDecoder
from adapterhub.base.native.model import supports
from adapterhub.base.native.structs import Matrix, address
from adapterhub.base.native.structs import Segment as NativeSegment
from adapterhub.swap.peft import MAX_RANK
from tests.kernels import (
    CONTEXTS,
    GROUPS,
    HEAD_DIMS,
    MIXED_ROWS,
    MIXES,
    RANKS,
    WINDOW,
    InPool,
    batch,
    close,
    in_pool,
    random,
)
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


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("rank", [*RANKS, 128, MAX_RANK - 1, MAX_RANK])
def test_lora_is_an_fp32_loop_over_segments(isa: Isa, mix: str, rank: int) -> None:
    n_in, n_out, tokens = 96, 80, MIXED_ROWS
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
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("window", [0, WINDOW])
def test_attention_is_a_softmax_over_each_tokens_context(isa: Isa, dim: int, group: int, window: int) -> None:
    contexts, kv_heads, scale = CONTEXTS, 2, dim**-0.5
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


def bases(family: str) -> tuple[Base, Base]:
    """The same model in bf16, as it is served, and in fp32."""
    model = tiny_model(family)
    served = model.bfloat16()
    return prepare_base("tiny", copy.deepcopy(served), None, CPU), prepare_base("tiny", served.float(), None, CPU)


def caches(*both: Base) -> list[KVCache]:
    return [KVCache(base.kv_shapes, 1 << 20, base.dtype, CPU) for base in both]


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


def chosen(whole: Batch, order: list[int], adapters: list[InPool | None], kv: KVCache, pool: torch.Tensor) -> Batch:
    """Some sequences of a batch, in another order."""
    rows = torch.cat([torch.arange(whole.spans[i].rows.start, whole.spans[i].rows.stop) for i in order])
    spans, segments = list[Span](), list[Segment]()
    for i in order:
        start, old = (spans[-1].rows.stop if spans else 0), whole.spans[i]
        spans.append(Span(start, old.length, old.context, old.blocks))
        if (adapter := adapters[i]) is not None:
            segments.append(Segment(start, start + old.length, adapter))
    return Batch(whole.tokens[rows], whole.positions[rows], spans, segments, kv, whole.slots[rows], pool)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_a_mixed_batch_is_each_sequence_alone_in_any_order(family: str, isa: Isa) -> None:
    served, _ = bases(family)
    pool = torch.zeros(1 << 18, dtype=torch.bfloat16)
    ranks = [4, 1, 17, 64, 3]
    starts = [served.layout.numel(sum(ranks[:i])) for i in range(len(ranks))]
    adapters: list[InPool | None] = [
        in_pool(pool, start, served.layout, served.layout, rank, seed=rank)
        for start, rank in zip(starts, ranks, strict=True)
    ]
    adapters.append(None)
    steps = [([3, 9, 1, 17, 2, 5], [3, 9, 1, 17, 2, 5]), ([1, 1, 1, 6, 1, 1], [4, 10, 2, 23, 3, 6])]

    def logits(order: list[int]) -> list[torch.Tensor]:
        """Of each sequence's last row, step by step: prompts, then decoding beside a prompt's second chunk."""
        [kv] = caches(served)
        decoder, found = NativeDecoder(served, kv, isa), []
        for lengths, contexts in steps:
            step = chosen(batch(kv, lengths, contexts, [None] * len(adapters)), order, adapters, kv, pool)
            rows = decoder.logits(step, torch.tensor([span.rows.stop - 1 for span in step.spans]))
            found.append(rows[torch.tensor(order).argsort()])
        return found

    with torch.no_grad():
        alone = [torch.cat(each) for each in zip(*(logits([i]) for i in range(len(adapters))), strict=True)]
        for seed in range(6):
            order = torch.randperm(len(adapters), generator=torch.Generator().manual_seed(seed)).tolist()
            assert all(map(torch.equal, logits(order), alone))


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
