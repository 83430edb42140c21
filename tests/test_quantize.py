"""The base in fewer bits: what is stored, what the kernels make of it, what it costs in quality, and that it trains."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import pytest
import torch

from adapterhub.base.batch import Batch, Segment, Span
from adapterhub.base.embedded import EMBEDDED
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


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", Precision)
def test_the_kernels_expand_what_torch_expands(precision: Precision, isa: Isa) -> None:
    stored = quantize(random(40, 96, seed=2), precision)
    matrix, out = Matrix.of(stored), torch.empty(30, 96, dtype=torch.bfloat16)
    library().adapterhub_expand(isa, ctypes.byref(matrix), 7, 37, address(out))
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
    close(y, x.float() @ stored.expand().float().T + bias.float(), 2e-3)


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
    assert (found - expected).norm() <= 1.5 * (rounded - expected).norm()


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


def test_perplexity_of_the_embedded_base_stays_within_bounds(tmp_path: Path) -> None:
    text = (Path(__file__).parent / "data" / "prose.txt").read_text()

    def perplexity(precision: Precision | None) -> float:
        base = load_base(Config(data_dir=tmp_path, base=EMBEDDED, quantize=precision))
        tokens = torch.tensor(TextCodec(base.tokenizer).encode(text))
        count = len(tokens)
        with torch.no_grad():
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
