"""Triton's kernels, in its interpreter on a CPU, against fp32 loops and against the torch path on whole models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, PreTrainedConfig

pytest.importorskip("triton")

from adapterhub.base import runner
from adapterhub.base.batch import Batch, Forward, Segment, Span
from adapterhub.base.inject import MultiplexedLinear, merge
from adapterhub.base.kv import KVCache
from adapterhub.base.model import Base, prepare_base
from adapterhub.base.quantize import Precision
from adapterhub.base.triton.attention import splits_of
from adapterhub.base.triton.capture import Watch
from adapterhub.base.triton.decoding import ROWS, DecodeSteps
from adapterhub.base.triton.lora import add_lora
from adapterhub.base.triton.tables import tables_for
from adapterhub.swap.layout import Layout, Target
from adapterhub.swap.pool import Pool
from tests.kernels import (
    ATTENTION_CASES,
    LORA_CASES,
    TOLERANCES,
    AttentionCase,
    InPool,
    LoraCase,
    attention_error,
    batch,
    forward_of,
    in_pool,
    lora_error,
    random,
)
from tests.tiny import CPU, GROUPED, greedy, kv_bytes, make_ref, peft_model, prompt_of, serving, tiny_model

ONE_LAYER = LlamaConfig(**{**GROUPED, "num_hidden_layers": 1})
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}
ROUNDING: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}  # some processors sum in an order that the rows' number decides


# in float16, whose products the interpreter makes as a GPU makes those of bfloat16, too (`tables.in_fp32`)
@pytest.mark.parametrize("case", LORA_CASES, ids=str)
def test_the_lora_op_is_an_fp32_loop(case: LoraCase) -> None:
    assert lora_error(case, FP16, CPU) <= TOLERANCES[FP16]


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_attention_is_a_softmax_over_each_tokens_context(case: AttentionCase) -> None:
    assert attention_error(case, FP16, CPU) <= TOLERANCES[FP16]


def test_a_decode_step_of_any_size_is_split_as_triton_can() -> None:
    for rows, kv_heads in product(range(1, 300), range(1, 70)):
        splits = splits_of(rows, kv_heads)
        assert splits in (1, 2, 4, 8, 16)
        assert splits == 1 or splits * rows * kv_heads <= 256
        assert splits == 16 or 2 * splits * rows * kv_heads > 256, "it would be split as well into twice as many"


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_the_same_in_other_dtypes(dtype: torch.dtype) -> None:
    for decoding in (True, False):
        assert (
            lora_error(LoraCase("distinct", (1, 17, 64, 8), 1100, (80, 24), decoding), dtype, CPU) <= TOLERANCES[dtype]
        )
        lengths = (1,) * 4 if decoding else (1, 9, 17, 3)
        for window, softcap in ((None, None), (7, 2.0)):
            case = AttentionCase(24, 3, lengths, (1, 9, 40, 33), window, softcap)
            assert attention_error(case, dtype, CPU) <= TOLERANCES[dtype]


def test_what_shrink_makes_keeps_fp32() -> None:
    """Its sums cancel to something small, which any rounding in between would lose."""
    n_in, layout = 2048, Layout((Target("0", 2048, 16),))
    a, b = torch.ones(2, n_in), torch.tensor([[1.0], [-1.0]]).expand(2, 16)
    a[0, 0] += 2**-7  # in bf16; x @ a[0] and x @ a[1] are 2048.0078 and 2048
    pool = torch.cat([a.reshape(-1), b.reshape(-1)]).to(BF16)
    adapter = InPool(2, torch.tensor([0]), {})
    for spans in ([Span(0, 1, 1), Span(1, 1, 1)], [Span(0, 2, 2)]):
        tables = tables_for(Forward([0] * 2, [0] * 2, [0] * 2, [0], spans, [Segment(0, 2, adapter)]), layout, CPU)
        y = add_lora(torch.zeros(2, 16, dtype=BF16), torch.ones(2, n_in, dtype=BF16), pool, tables, 0, (16,))
        assert torch.equal(y, torch.full((2, 16), 2**-7, dtype=BF16))


def test_a_pool_may_have_more_numbers_than_32_bits_count() -> None:
    layout, rank, start = Layout((Target("0", 32, 16),)), 4, 2**31 + 2**20
    pool = torch.from_numpy(np.zeros(2 * start + 1024, np.uint8)).view(FP16)  # of which the system gives a few pages
    adapter = in_pool(pool, start, layout, layout, rank, seed=1)
    x = random(3, 32, seed=2, dtype=FP16)
    expected = (x.float() @ adapter.factors["0"].a.float().T) @ adapter.factors["0"].b.float()
    for spans in ([Span(i, 1, 1) for i in range(3)], [Span(0, 3, 3)]):
        tables = tables_for(Forward([0] * 3, [0] * 3, [0] * 3, [0], spans, [Segment(0, 3, adapter)]), layout, CPU)
        y = add_lora(torch.zeros(3, 16, dtype=FP16), x, pool, tables, 0, (16,))
        assert torch.allclose(y.float(), expected, atol=1e-2)


def test_a_decoded_row_is_the_same_whatever_is_beside_it() -> None:
    layout = Layout((Target("0", 1600, 40), Target("1", 1600, 24)))
    pool = torch.zeros(4 * layout.numel(20), dtype=BF16)
    adapters = [in_pool(pool, i * layout.numel(20), layout, layout, 5 * i + 1, seed=i) for i in range(4)]
    x, y = random(9, 1600, seed=1), random(9, 64, seed=2)

    def run(rows: list[int]) -> torch.Tensor:
        none, count = [0] * len(rows), len(rows)
        segments = [Segment(i, i + 1, adapters[row % 4]) for i, row in enumerate(rows)]
        forward = Forward(none, none, none, [0], [Span(i, 1, 1) for i in range(count)], segments)
        return add_lora(y[rows].clone(), x[rows], pool, tables_for(forward, layout, CPU), 0, (40, 24))

    together = run(list(range(9)))
    assert all(torch.equal(run([row])[0], together[row]) for row in range(9))


# -- whole models


def served(family: str | PreTrainedConfig) -> Base:
    """As on a GPU: linears that read the same input compute together."""
    base = prepare_base("tiny", tiny_model(family), None, CPU)
    merge(base.model, base.groups)
    return base


def adapters_in(pool: torch.Tensor, base: Base) -> list[InPool | None]:
    some = base.layout.subset([t.name for t in base.layout.targets][1::2])
    first = in_pool(pool, 0, base.layout, base.layout, 5, seed=1)
    return [first, None, in_pool(pool, 1 << 16, some, base.layout, 18, seed=2)]


def on_kernels(base: Base, kv: KVCache, pool: torch.Tensor, forward: Forward) -> Batch:
    tables = tables_for(forward, base.layout, CPU)
    spans, segments = forward.spans, forward.segments
    return Batch(tables.tokens, tables.positions, spans, segments, kv, tables.slots, pool, tables)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt_neox", "phi"])
def test_a_forward_is_what_the_torch_path_computes(family: str) -> None:
    base = served(family)
    pool = torch.zeros(1 << 17)
    adapters = adapters_in(pool, base)
    kv, kv_torch = (KVCache(base.kv_shapes, 1 << 20, FP32, CPU) for _ in range(2))
    steps = [([20, 37, 1], [20, 37, 1]), ([1, 1, 10], [21, 38, 11]), ([1, 1, 1], [22, 39, 12])]
    with torch.no_grad():
        for lengths, contexts in steps:  # prompts, then a prompt's second chunk beside decoding, then decoding alone
            forward = forward_of(lengths, contexts, adapters)
            ours = on_kernels(base, kv, pool, forward)
            found = base.logits(ours, ours.tables.wanted)
            expected = base.logits(batch(kv_torch, lengths, contexts, adapters), torch.tensor(forward.wanted))
            assert torch.allclose(found, expected, **CLOSE)


@pytest.mark.parametrize(("family", "groups"), [("llama", ["qkv", "gate, up"]), ("phi", ["qkv"]), ("gpt_neox", [])])
def test_linears_that_read_the_same_input_compute_in_one_go(
    family: str, groups: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = served(family)
    sizes = {"qkv": ["q_proj", "k_proj", "v_proj"], "gate, up": ["gate_proj", "up_proj"]}
    expected = [sizes[group] for _ in range(2) for group in groups]
    assert [[name.rpartition(".")[2] for name in group] for group in base.groups] == expected
    pool = torch.zeros(1 << 17)
    calls: list[tuple[int, int]] = []

    def note(y: torch.Tensor, x: torch.Tensor, pool: Any, tables: Any, first: int, widths: tuple[int, ...]) -> Any:
        calls.append((first, len(widths)))
        return y

    monkeypatch.setattr("adapterhub.base.triton.lora.add_lora", note)
    kv = KVCache(base.kv_shapes, 1 << 20, FP32, CPU)
    with torch.no_grad():
        ours = on_kernels(base, kv, pool, forward_of([1, 2], [1, 2], adapters_in(pool, base)[:2]))
        base.logits(ours, ours.tables.wanted)
    assert sum(count for _, count in calls) == len(base.layout.targets)
    assert len(calls) == len(base.layout.targets) - sum(len(group) - 1 for group in base.groups)


def test_merged_weights_are_held_once_and_the_torch_path_uses_them() -> None:
    base = served("qwen2")  # with biases
    plain = prepare_base("tiny", tiny_model("qwen2"), None, CPU)
    assert base.fingerprint == plain.fingerprint
    assert base.nbytes == plain.nbytes
    attention = base.model.model.layers[0].self_attn
    assert attention.q_proj.weight.untyped_storage().data_ptr() == attention.v_proj.weight.untyped_storage().data_ptr()
    caches = [KVCache(base.kv_shapes, 1 << 20, FP32, CPU) for _ in range(2)]
    with torch.no_grad():
        found, expected = (
            one.logits(batch(kv, [9], [9], [None]), torch.tensor([8]))
            for one, kv in zip((base, plain), caches, strict=True)
        )
    assert torch.allclose(found, expected, **CLOSE)


def test_a_quantized_base_is_served_linear_by_linear() -> None:
    base = prepare_base("tiny", tiny_model("llama"), None, CPU, Precision.INT8)
    assert not any(m.together for m in base.model.modules() if isinstance(m, MultiplexedLinear))
    pool = torch.zeros(1 << 17)
    adapters = adapters_in(pool, base)
    kv, kv_torch = (KVCache(base.kv_shapes, 1 << 20, FP32, CPU) for _ in range(2))
    with torch.no_grad():
        ours = on_kernels(base, kv, pool, forward_of([3, 1, 2], [3, 1, 2], adapters))
        found = base.logits(ours, ours.tables.wanted)
        expected = base.logits(batch(kv_torch, [3, 1, 2], [3, 1, 2], adapters), ours.tables.wanted)
    assert torch.allclose(found, expected, **CLOSE)


# -- decode steps in buffers that stay


def test_padded_decode_steps_are_the_unpadded_forward_for_any_mix_of_adapters() -> None:
    base = served(ONE_LAYER)
    pool = Pool(1 << 19, FP32, CPU)
    kv, other = (KVCache(base.kv_shapes, kv_bytes(base, 64), FP32, CPU) for _ in range(2))
    steps = DecodeSteps(base, kv, pool)
    old = adapters_in(pool.tensor, base)
    new = in_pool(pool.tensor, 1 << 15, base.layout, base.layout, 33, seed=7)  # of a larger rank than any before
    mixes = [old, [None] * 3, [new, new, new, old[0], None], [new]]
    with torch.no_grad():
        for step, adapters in enumerate(mixes):
            ones = [1] * len(adapters)
            forward = forward_of(ones, [step + 1] * len(adapters), adapters)
            assert steps.take(forward)
            found = steps.logits(forward).clone()
            plain = on_kernels(base, other, pool.tensor, forward)
            torch.testing.assert_close(found, base.logits(plain, plain.tables.wanted), **ROUNDING)
            for layer in base.kv_shapes:  # padding wrote nothing
                for written, right in zip(kv.layer(layer), other.layer(layer), strict=True):
                    torch.testing.assert_close(written, right, **ROUNDING)
    assert not steps.take(forward_of([1, 2], [1, 2], [None, None]))
    assert not steps.take(forward_of([1] * (ROWS[-1] + 1), [1] * (ROWS[-1] + 1), [None] * (ROWS[-1] + 1)))


def test_a_decode_step_asks_nothing_of_the_device() -> None:
    """Or it could not be captured in a graph: the host never looks at a tensor's numbers."""
    base = served(ONE_LAYER)
    pool = Pool(1 << 19, FP32, CPU)
    steps = DecodeSteps(base, KVCache(base.kv_shapes, kv_bytes(base, 64), FP32, CPU), pool)
    adapters = adapters_in(pool.tensor, base)
    with torch.no_grad():
        steps.logits(forward_of([1] * 3, [1] * 3, adapters))
        with Watch() as watch:
            steps.logits(forward_of([1] * 3, [2] * 3, adapters))
    assert not watch.looked


def test_an_engine_on_the_kernels_answers_as_peft_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, model = served("llama"), tiny_model("llama")
    refs = [make_ref(model, base, tmp_path, seed=seed, **config) for seed, config in enumerate(({"r": 4}, {"r": 19}))]
    oracles = [peft_model(model, seed=seed, **config) for seed, config in enumerate(({"r": 4}, {"r": 19}))]
    prompts = [prompt_of(length, length) for length in (3, 18, 9)]
    monkeypatch.setattr(runner, "usable", lambda device: True)
    with serving(base, tmp_path, max_step_tokens=16) as client:
        names = [
            client.submit(f"{i}", p, ref, max_tokens=4)
            for i, (p, ref) in enumerate(zip(prompts, [*refs, None], strict=True))
        ]
        found = [client.tokens(name) for name in names]
    expected = [greedy(one, prompt, 4) for one, prompt in zip([*oracles, model], prompts, strict=True)]
    assert found == expected


# -- for a GPU that is not here


def test_every_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    """For bf16 and the shapes of Qwen2.5-0.5B and Llama-3.1-8B: within the shared memory of any such GPU, in its
    registers, and without loading numbers one by one, as happens to what is not known to be aligned."""
    root = Path(__file__).resolve().parents[1]
    env = {**os.environ, "PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.compiling", "90"]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    rows, attention = {"_rows", "_shrink_rows", "_expand_rows"}, {"_attend", "_join", "_write_kv"}
    tiles = {"_shrink_tiles", "_expand_tiles", "_expand_back", "_add_gradients"}
    assert {kernel["name"] for kernel in kernels} == rows | attention | tiles
    for kernel in kernels:
        assert kernel["shared"] <= 99 * 1024, kernel
        assert kernel["spills"] == 0, kernel
        assert not kernel["single_loads"] or kernel["name"] == "_write_kv", kernel
        assert not kernel["single_words"] or kernel["name"] not in tiles, kernel
