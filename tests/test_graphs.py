"""Captured decode steps without a GPU: what a graph would do again is done again by the same kernels, on what the
buffers hold by then and at the addresses of the capture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from adapterhub.base import runner
from adapterhub.base.kv import KVCache
from adapterhub.base.triton.capture import Captured
from adapterhub.base.triton.decoding import DecodeSteps, sizes_for
from adapterhub.base.triton.rehearsal import rehearsals
from adapterhub.base.triton.tables import Sizes, Tables, fill
from adapterhub.swap.pool import Pool
from tests.kernels import forward_of, in_pool
from tests.scarce import NO_MEMORY
from tests.test_triton import FP32, ONE_LAYER, ROUNDING, adapters_in, on_kernels, served
from tests.tiny import CPU, Client, greedy, kv_bytes, make_ref, peft_model, prompt_of, serving, tiny_model


class Graph:
    """Of one forward, as it was at the capture: the host's lists of a later one are not seen, as no graph sees them."""

    def __init__(self, forward: Callable[[], torch.Tensor]) -> None:
        self._forward = forward
        self.logits = torch.zeros_like(forward())
        self.fails = False

    def replay(self) -> None:
        if self.fails:
            raise torch.OutOfMemoryError(NO_MEMORY)
        self.logits.copy_(self._forward())


class Captures:
    """What takes the place of a GPU's captures; fails where `error` says so."""

    def __init__(self, steps: DecodeSteps) -> None:
        self.count, self.error = 0, None
        self.error: Exception | None
        self.steps = steps
        steps._captures = True
        steps._capturer = self  # type: ignore[assignment]

    def capture(self, forward: Callable[[], torch.Tensor]) -> Any:
        self.count += 1
        if self.error is not None:
            raise self.error
        graph = Graph(forward)
        return Captured(graph, graph.logits)  # type: ignore[arg-type]

    def let_go(self) -> None:
        pass


def test_replays_are_right_for_adapters_that_came_later_for_any_mix_and_after_the_pool_went_elsewhere() -> None:
    base = served(ONE_LAYER)
    pool = Pool(1 << 19, FP32, CPU)
    kv, other = (KVCache(base.kv_shapes, kv_bytes(base, 64), FP32, CPU) for _ in range(2))
    steps = DecodeSteps(base, kv, pool)
    captures = Captures(steps)
    old = adapters_in(pool.tensor, base)
    new = in_pool(pool.tensor, 1 << 15, base.layout, base.layout, 33, seed=7)  # of a larger rank than any before
    mixes = [old, [None] * 3, [new, None, new], [old[0], None, new], [None] * 3, old]
    with torch.no_grad():
        for step, adapters in enumerate(mixes):
            if step == 4:  # as after another budget: the same blocks elsewhere, and nothing where they were
                before, memory = pool.tensor, pool.memory(1 << 20)
                memory[: len(before)].copy_(before)
                pool.tensor = memory
                before.zero_()
            forward = forward_of([1] * 3, [step + 1] * 3, adapters)
            found = steps.logits(forward).clone()
            plain = on_kernels(base, other, pool.tensor, forward)
            torch.testing.assert_close(found, base.logits(plain, plain.tables.wanted), **ROUNDING)
    assert captures.count == 4  # with and without adapters, on either pool
    assert steps.graphs == 2


@pytest.fixture
def client_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(runner, "usable", lambda device: True)
    base = served(ONE_LAYER)
    ref = make_ref(tiny_model(ONE_LAYER), base, tmp_path)
    with serving(base, tmp_path, max_step_tokens=16) as client:
        captures = Captures(client.engine._serving.runner._decode_steps)  # type: ignore[arg-type]
        yield client, captures, ref


def ask(client: Client, ref: Any, count: int) -> None:
    """Decodes `count` tokens, and compares."""
    expected = greedy(peft_model(tiny_model(ONE_LAYER)), prompt_of(3), count)
    assert client.ask(prompt_of(3), ref, max_tokens=count) == expected


def out_of_memory(client: Client) -> int:
    return client.engine.stats().result(30)["engine"]["out_of_memory"]


def test_without_memory_for_a_graph_steps_are_launched_one_by_one_and_it_is_tried_again_later(client_of: Any) -> None:
    client, captures, ref = client_of
    captures.error = torch.OutOfMemoryError(NO_MEMORY)
    ask(client, ref, 12)
    assert (captures.count, out_of_memory(client), captures.steps.graphs) == (1, 1, 0)
    captures.error = None
    ask(client, ref, 24)
    assert (captures.count, out_of_memory(client), captures.steps.graphs) == (2, 1, 1)


def test_graphs_that_find_no_memory_when_they_are_replayed_are_dropped(client_of: Any) -> None:
    client, captures, ref = client_of
    ask(client, ref, 4)
    assert captures.steps.graphs == 1
    for captured in captures.steps._graphs.values():
        captured.graph.fails = True
    ask(client, ref, 4)
    assert (captures.count, out_of_memory(client), captures.steps.graphs) == (1, 1, 0)


def test_a_base_that_cannot_be_captured_is_launched_one_by_one_for_good_with_one_warning(
    client_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    client, captures, ref = client_of
    captures.error = RuntimeError("operation not permitted when stream is capturing")
    ask(client, ref, 30)
    assert (captures.count, out_of_memory(client)) == (1, 0)
    assert caplog.text.count("one kernel at a time") == 1


# -- before the first request


def test_once_it_is_warm_no_request_waits_for_a_capture_and_nothing_remains_of_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "usable", lambda device: True)
    base = served(ONE_LAYER)
    ref = make_ref(tiny_model(ONE_LAYER), base, tmp_path)
    with serving(base, tmp_path, max_batch=2, max_step_tokens=4) as client:
        captures = Captures(client.engine._serving.runner._decode_steps)  # type: ignore[arg-type]
        client.engine.warm_up().result(600)
        assert captures.count == captures.steps.graphs == 4  # of one row and of two, with and without adapters
        assert not any(part.any() for layer in base.kv_shapes for part in client.engine.kv.layer(layer))
        ask(client, ref, 4)
        assert captures.count == 4


def test_steps_of_nobody_are_of_every_kind_and_within_what_serving_may_have() -> None:
    for sequences, tokens in ((1, 1), (1, 8), (5, 5), (32, 256), (100, 100)):
        forwards = list(rehearsals(7, sizes_for(sequences), sequences, tokens))
        assert all(len(f.tokens) <= tokens and len(f.spans) <= sequences for f in forwards[:12])
        assert {len(f.tokens) for f in forwards[12:]} == set(sizes_for(sequences))
        assert max(len(f.tokens) for f in forwards[:12]) == tokens
        for forward in forwards:
            sizes = Sizes(len(forward.tokens), len(forward.wanted), len(forward.segments), 64, 0, 0, 999, 7, True)
            tables = Tables.of(torch.zeros(sizes.numel, dtype=torch.int64), sizes)
            fill(tables, forward)
            assert (tables.slots == -1).all()
            assert (tables.offsets == -1).all()
            assert (tables.adapters >= 0).all() if forward.segments else (tables.adapters == -1).all()
        assert sum(1 for f in forwards if not f.segments) == 3 + len(sizes_for(sequences))
