"""Attention of a training forward in one launch, with a stand-in for torch's `varlen_attn`, which only GPUs have."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from adapterhub.base import varlen
from adapterhub.base.attention import attend
from adapterhub.base.batch import Batch, Slot, Span
from tests.tiny import CPU

LENGTHS = [3, 1, 30, 12]


class Module(torch.nn.Module):
    def __init__(self, slot: Slot) -> None:
        super().__init__()
        self.adapterhub_slot, self.layer_idx = slot, 0


def by_the_book(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """As torch 2.11 documents it: [T, heads, d]; a token sees window_size[0] tokens before it and none after."""
    assert cu_seq_q.dtype is cu_seq_k.dtype is torch.int32
    assert max_q == max_k == int((cu_seq_q[1:] - cu_seq_q[:-1]).max())
    assert window_size[1] == 0
    parts = []
    for start, end in zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:], strict=False):
        at = torch.arange(end - start)
        back = at[:, None] - at[None, :]
        sees = (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
        q, k, v = (part[start:end].transpose(0, 1)[None] for part in (query, key, value))
        parts.append(scaled_dot_product_attention(q, k, v, sees, scale=scale, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(parts)


def of_torch_2_13(*args: Any, enable_gqa: bool = False, window_size: tuple[int, int] = (-1, -1), **more: Any) -> Any:
    assert enable_gqa == (args[0].shape[1] != args[1].shape[1])
    return by_the_book(*args, window_size=window_size, **more)


def without_windows(*args: Any, window_size: tuple[int, int] = (-1, -1), **more: Any) -> Any:
    return by_the_book(*args, window_size=(-1, 0), **more)


def broken(*args: Any, window_size: tuple[int, int] = (-1, -1), **more: Any) -> Any:
    raise RuntimeError("no such kernel")


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[..., Any]], list[int]]]:
    """Makes a stand-in torch's own; returns how often it was called."""

    def installed(stand_in: Callable[..., Any]) -> list[int]:
        calls: list[int] = []

        def counted(*args: Any, window_size: tuple[int, int] = (-1, -1), **more: Any) -> Any:
            calls.append(1)
            return stand_in(*args, window_size=window_size, **more)

        counted.__signature__ = inspect.signature(stand_in)  # type: ignore[attr-defined]
        monkeypatch.setattr(varlen, "_possible", lambda q: True)
        monkeypatch.setattr(varlen, "_varlen_attn", lambda: counted)
        return calls

    forget()
    yield installed
    forget()


def forget() -> None:
    varlen._works.cache_clear()
    varlen._warn.cache_clear()


def attention(heads: int, window: int | None) -> list[torch.Tensor]:
    """Output, and gradients of q, k and v."""
    total, generator = sum(LENGTHS), torch.Generator().manual_seed(1)
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    spans = [Span(start, length, length) for start, length in zip(starts, LENGTHS, strict=True)]
    batch, slot = Batch(torch.zeros(total), torch.zeros(total), spans, []), Slot()
    parts = [torch.randn(1, n, total, 16, generator=generator).requires_grad_() for n in (heads, 2, 2)]
    with slot.running(batch):
        out, _ = attend(Module(slot), *parts, None, sliding_window=window)
    return [out.detach(), *torch.autograd.grad(out, parts, torch.randn(out.shape, generator=generator))]


@pytest.mark.parametrize("stand_in", [by_the_book, of_torch_2_13])
@pytest.mark.parametrize(("heads", "window"), [(2, None), (6, None), (2, 5), (6, 1), (6, 100)])
def test_all_sequences_at_once_give_what_one_by_one_gives(
    install: Any, stand_in: Callable[..., Any], heads: int, window: int | None
) -> None:
    expected = attention(heads, window)
    calls = install(stand_in)
    for found, right in zip(attention(heads, window), expected, strict=True):
        assert torch.allclose(found, right, atol=1e-5)
    assert len(calls) == 2  # once to try it


@pytest.mark.parametrize("stand_in", [broken, without_windows])
def test_what_fails_or_differs_is_tried_once_and_told_once(
    install: Any, stand_in: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    expected = attention(4, 5)
    calls = install(stand_in)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert all(torch.equal(f, e) for f, e in zip(attention(4, 5), expected, strict=True))
    assert len(calls) == 1
    [record] = caplog.records
    assert "Training attends to sequences one by one" in record.message


def test_elsewhere_than_on_a_gpu_torchs_own_is_not_asked() -> None:
    q = torch.zeros(2, 4, 16, dtype=torch.bfloat16, device=CPU)
    assert not varlen.usable(q, q, q, None)
