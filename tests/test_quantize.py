"""The base in fewer bits: what is stored, what the kernels make of it, what it costs in quality, and that it trains."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import pytest
import torch

from adapterhub.base.batch import KV_BLOCK, Batch, Segment, Span
from adapterhub.base.embedded import EMBEDDED
from adapterhub.base.kv import KVCache
from adapterhub.base.model import Base, load_base, prepare_base
from adapterhub.base.native import Isa, best_isa, library
from adapterhub.base.native.decoder import NativeDecoder
from adapterhub.base.native.structs import Matrix, address
from adapterhub.base.quantize import GROUP, Precision, QuantizedWeight, quantize
from adapterhub.base.text import TextCodec
from adapterhub.config import Config
from adapterhub.errors import BadRequest
from tests.test_native import batch, caches, close, in_pool, random
from tests.tiny import CPU, tiny_model

ISAS = [isa for isa in Isa if library() is not None and isa <= best_isa()]


@pytest.mark.parametrize("precision", Precision)
def test_each_number_is_within_half_a_level_of_itself(precision: Precision) -> None:
    weight = random(24, 96, seed=1)
    weight[0, :GROUP] = 0.25  # a group of equal numbers
    weight[1, :GROUP] *= 1000
    expanded = quantize(weight, precision).expand()
    groups = weight.float().view(24, 3, GROUP)
    level = (groups.amax(-1) - groups.amin(-1)) / (precision.levels - 1)
    size = groups.abs().amax(-1)
    allowed = 0.5 * level + (2**-8 + precision.levels * 2**-9 / 255) * size  # half a level, and bf16's own rounding
    error = (expanded.float() - weight.float()).view(24, 3, GROUP).abs().amax(-1)
    assert (error <= allowed + 0.02 * level).all()


@pytest.mark.parametrize("precision", Precision)
def test_the_kernels_expand_what_torch_expands(precision: Precision) -> None:
    stored = quantize(random(40, 96, seed=2), precision)
    matrix, out = Matrix.of(stored), torch.empty(30, 96, dtype=torch.bfloat16)
    library().adapterhub_expand(ctypes.byref(matrix), 7, 37, address(out))
    close(out.float(), stored.expand()[7:37].float(), 2e-3)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_a_quantized_linear_is_the_product_with_the_expanded_weight(
    precision: Precision, isa: Isa, tokens: int
) -> None:
    stored, bias, x = quantize(random(144, 96, seed=3), precision), random(144, seed=4), random(tokens, 96, seed=5)
    y, matrix = torch.empty(tokens, 144), Matrix.of(stored, bias)
    library().adapterhub_linear(isa, ctypes.byref(matrix), address(x), tokens, address(y))
    integers = isa is not Isa.PORTABLE  # activations are rounded there, by 0.5 % of their size if they are normal
    close(y, x.float() @ stored.expand().float().T + bias.float(), 1e-2 if integers else 2e-3)


def coded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x in int8 levels, and the levels' sizes: each [tokens, groups, 32], as fp64."""
    groups = x.float().view(len(x), -1, GROUP)
    largest = groups.abs().amax(-1, keepdim=True)
    q = (groups * torch.where(largest > 0, torch.full_like(largest, 127) / largest, 0)).round()
    return q.double(), (largest / 127).double().expand_as(groups)


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa is not Isa.PORTABLE])
@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize(("rows", "cols"), [(64, 128), (80, 576), (16, 32), (7, 96), (130, 64), (48, 1536)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 16, 37])
def test_in_integers_only_the_activations_rounding_is_lost(
    precision: Precision, isa: Isa, rows: int, cols: int, tokens: int
) -> None:
    stored, bias = quantize(random(rows, cols, seed=1), precision), random(rows, seed=2)
    x = random(tokens, cols, seed=3)
    x[0, :GROUP] = 0
    x[-1, 3] = 1000  # spoils nothing but its own group
    y, matrix = torch.full((tokens, rows), float("nan")), Matrix.of(stored, bias)
    library().adapterhub_linear(isa, ctypes.byref(matrix), address(x), tokens, address(y))
    q, level = coded(x)
    weight = quantized_numbers(stored)
    close(y, ((q * level).flatten(1) @ weight.T + bias.double()).float(), 2e-6)
    exact = x.double() @ weight.T + bias.double()
    allowed = (0.5 * level).flatten(1) @ weight.abs().T  # half a level for each
    assert ((y - exact).abs() <= 1.001 * allowed + 1e-4).all()


def quantized_numbers(stored: QuantizedWeight) -> torch.Tensor:
    """What a stored weight stands for, not rounded to bf16: [rows, cols] in fp64."""
    rows, cols = stored.shape
    q = stored.data
    if stored.precision is Precision.INT4:
        q = torch.stack((q & 15, q >> 4), dim=-1)
    groups = q.double().view(rows, cols // GROUP, GROUP)
    return (groups * stored.scales.double().unsqueeze(-1) + stored.minima.double().unsqueeze(-1)).view(rows, cols)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("cols", [96, 576, 1536])
def test_a_tokens_product_is_the_same_among_any_number(precision: Precision, isa: Isa, cols: int) -> None:
    stored, x = quantize(random(144, cols, seed=6), precision), random(41, cols, seed=7)
    matrix = Matrix.of(stored)

    def product(first: int, last: int) -> torch.Tensor:
        y, some = torch.empty(last - first, 144), x[first:last].contiguous()
        library().adapterhub_linear(isa, ctypes.byref(matrix), address(some), len(some), address(y))
        return y

    alone = torch.cat([product(t, t + 1) for t in range(len(x))])
    for count in (2, 3, 4, 5, 8, 11, 12, 16, 17, 30, 41):
        assert torch.equal(product(0, count), alone[:count]), count


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", Precision)
def test_a_mixed_step_on_a_quantized_base_is_each_sequence_alone(precision: Precision, isa: Isa) -> None:
    served = quantized_base(precision)
    pool = torch.zeros(1 << 17, dtype=torch.bfloat16)
    adapters = [in_pool(pool, i << 13, served.layout, served.layout, 4, seed=i) for i in range(3)] + [None]
    lengths = [3, 9, 1, 17]
    ends = torch.tensor(lengths).cumsum(0)
    kv, kv_alone = caches(served, served)
    decoder, other = NativeDecoder(served, kv, isa), NativeDecoder(served, kv_alone, isa)
    whole = batch(kv, lengths, lengths, adapters, pool)
    with torch.no_grad():
        together = decoder.logits(whole, torch.arange(sum(lengths)))
        for i, length in enumerate(lengths):
            rows = slice(int(ends[i]) - length, int(ends[i]))
            for at in range(length):  # alone, and a token at a time
                row = slice(rows.start + at, rows.start + at + 1)
                one = Batch(
                    whole.tokens[row].contiguous(),
                    whole.positions[row].contiguous(),
                    [Span(0, 1, at + 1, whole.spans[i].blocks)],
                    [] if adapters[i] is None else [Segment(0, 1, adapters[i])],
                    kv_alone,
                    whole.slots[row].contiguous(),
                    pool,
                )
                assert torch.equal(other.logits(one, torch.tensor([0]))[0], together[row.start])


def quantized_base(precision: Precision) -> Base:
    return prepare_base("tiny", tiny_model("qwen2").bfloat16(), None, CPU, precision)


@pytest.mark.parametrize("precision", Precision)
def test_a_native_step_on_a_quantized_base_is_its_torch_forward(precision: Precision) -> None:
    served = quantized_base(precision)
    exact = prepare_base("tiny", tiny_model("qwen2").bfloat16().float(), None, CPU, precision)
    pool = torch.zeros(1 << 16, dtype=torch.bfloat16)
    adapters = [in_pool(pool, 0, served.layout, served.layout, 5, seed=1), None]
    kv, kv_torch, kv_exact = caches(served, served, exact)
    decoder = NativeDecoder(served, kv)
    ends = torch.tensor([12, 33])
    with torch.no_grad():
        found = decoder.logits(batch(kv, [13, 21], [13, 21], adapters, pool), ends)
        rounded = served.logits(batch(kv_torch, [13, 21], [13, 21], adapters), ends).float()
        expected = exact.logits(batch(kv_exact, [13, 21], [13, 21], adapters), ends)
    integers = best_isa() is not Isa.PORTABLE  # int8 activations lie three times as far from the truth as bf16
    assert (found - expected).norm() <= (4 if integers else 1.5) * (rounded - expected).norm()


def test_adapters_serve_on_the_base_in_any_precision() -> None:
    plain = prepare_base("tiny", tiny_model("qwen2").bfloat16(), None, CPU)
    for precision in Precision:
        served = quantized_base(precision)
        assert (served.fingerprint, served.layout) == (plain.fingerprint, plain.layout)
        assert served.nbytes < plain.nbytes


def test_gradients_flow_through_a_quantized_base() -> None:
    served = quantized_base(Precision.INT4)
    factors = {}
    for target in served.layout.targets:
        a = random(4, target.n_in, seed=1).float().requires_grad_()
        factors[target.name] = type("Pair", (), {"a": a, "b": random(4, target.n_out, seed=2).float().requires_grad_()})
    adapter = type("Adapter", (), {"factors": factors})
    tokens = torch.arange(3, 12)
    work = Batch(tokens, torch.arange(9), [Span(0, 9, 9)], [Segment(0, 9, adapter)])
    served.logits(work, torch.arange(9)).float().logsumexp(-1).sum().backward()
    assert all(pair.a.grad is not None and pair.a.grad.norm() > 0 for pair in factors.values())


def test_an_unknown_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="int8, int4"):
        load_base(Config(data_dir=tmp_path, quantize="int3"))


@pytest.mark.parametrize("native", [False, True])
def test_perplexity_of_the_embedded_base_stays_within_bounds(tmp_path: Path, native: bool) -> None:
    text = (Path(__file__).parent / "data" / "prose.txt").read_text()

    def perplexity(precision: Precision | None) -> float:
        base = load_base(Config(data_dir=tmp_path, base=EMBEDDED, quantize=precision))
        tokens = torch.tensor(TextCodec(base.tokenizer).encode(text))
        count = len(tokens)
        with torch.no_grad():
            if native:  # where activations are rounded too
                kv = KVCache(base.kv_shapes, 128 << 20, base.dtype, CPU)
                blocks = tuple(range(1, 1 + kv.blocks_for(count)))
                span, slots = Span(0, count, count, blocks), torch.arange(count) + KV_BLOCK
                pool = torch.zeros(1, dtype=torch.bfloat16)
                work = Batch(tokens, torch.arange(count), [span], [], kv, slots, pool)
                logits = NativeDecoder(base, kv).logits(work, torch.arange(count - 1))
            else:
                work = Batch(tokens, torch.arange(count), [Span(0, count, count)], [])
                logits = base.logits(work, torch.arange(count - 1)).float()
        return math.exp(torch.nn.functional.cross_entropy(logits, tokens[1:]).item())

    plain = perplexity(None)
    assert 5 < plain < 50
    eight, four = perplexity(Precision.INT8), perplexity(Precision.INT4)
    assert eight < 1.01 * plain, (plain, eight, four)
    assert four < 1.04 * plain, (plain, eight, four)


def test_four_bits_take_five_eighths_of_a_byte_a_number() -> None:
    stored = quantize(random(64, 64), Precision.INT4)
    assert isinstance(stored, QuantizedWeight)
    assert sum(t.nbytes for t in stored.buffers()) == 64 * 64 * 5 // 8
