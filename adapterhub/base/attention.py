"""Attention over the paged KV cache, as an implementation of transformers' attention interface.

Every layer of an injected model comes here with the queries, keys and values of all tokens of the forward, end to end.
Keys and values go into the cache; then, on a GPU, Triton's kernels compute all sequences together. Elsewhere those that
decode one token are computed together, and the others one by one. This is the torch backend, which also trains (no
cache, the whole context in the forward; on a GPU all sequences together, see `varlen.py`); decoding in bf16 on a CPU
goes to native code.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from adapterhub.base import varlen
from adapterhub.base.batch import Batch, Span
from adapterhub.base.native import ops
from adapterhub.errors import BadRequest

ATTENTION = "adapterhub"
# What some models pass along that changes the result; a base that does cannot be served until it is implemented.
_UNSUPPORTED = ("s_aux", "position_bias", "head_mask")


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, heads, T, d], key [1, kv_heads, T, d], value [1, kv_heads, T, d_v] -> ([1, T, heads, d_v], None)."""
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise BadRequest(f"This base's attention uses {name}, which is not supported. Serve another base.")
    batch: Batch = module.adapterhub_slot.batch  # type: ignore[assignment, union-attr]
    if batch.give_way is not None:
        batch.give_way()
    q, k, v = query[0], key[0], value[0]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: int = module.layer_idx  # type: ignore[assignment]
    if batch.tables is not None and batch.kv is not None:
        return _attend_by_triton(batch, layer, q, k, v, scale, sliding_window, softcap).unsqueeze(0), None
    if batch.kv is not None:
        batch.kv.write(layer, k, v, batch.slots)
    elif softcap is None and varlen.usable(q, k, v, sliding_window):
        return varlen.attend(q, k, v, batch.ends, batch.longest, scale, sliding_window).unsqueeze(0), None
    parts = []
    for span in batch.prefills:
        k_all, v_all = k[:, span.rows], v[:, span.rows]
        if span.context > span.length:
            assert batch.kv is not None
            k_all, v_all = batch.kv.read(layer, span)
        mask = _mask(span, sliding_window, q.device)
        parts.append((span, _attend_one(q[:, span.rows], k_all, v_all, mask, scale, softcap)))
    if batch.decodes:
        out = _attend_decodes(batch, layer, q, k, v, scale, sliding_window, softcap)
        parts.extend((span, out[:, i : i + 1]) for i, span in enumerate(batch.decodes))
    joined = _in_order(parts)
    return joined.transpose(0, 1).unsqueeze(0), None


def _attend_by_triton(
    batch: Batch,
    layer: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Writes k and v into the cache, and attends -> [T, heads, d_v]."""
    from adapterhub.base.triton import attention  # triton is only there where torch is built for CUDA

    assert batch.kv is not None
    assert batch.tables is not None
    keys, values = batch.kv.layer(layer)
    attention.write_kv(keys, values, k, v, batch.tables.slots)
    return attention.attend_paged(q, keys, values, batch.tables, scale, window, softcap)


def _in_order(parts: Iterable[tuple[Span, torch.Tensor]]) -> torch.Tensor:
    ordered = [part for _, part in sorted(parts, key=lambda pair: pair[0].start)]
    return ordered[0] if len(ordered) == 1 else torch.cat(ordered, dim=1)


def _mask(span: Span, window: int | None, device: torch.device) -> torch.Tensor | None:
    """[length, context], True where a token may look; None for plain causality over the forward's own rows."""
    if span.context == span.length and (window is None or span.context <= window):
        return None
    last = torch.arange(span.context - span.length, span.context, device=device).unsqueeze(1)
    at = torch.arange(span.context, device=device).unsqueeze(0)
    mask = at <= last
    return mask if window is None else mask & (at > last - window)


def _attend_one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float, softcap: float | None
) -> torch.Tensor:
    """q [heads, L, d], k and v [kv_heads, S, ..] -> [heads, L, d_v]."""
    if softcap is None:
        dtype = q.dtype
        if torch.is_grad_enabled() and q.device.type == "cpu":  # the CPU's backward is up to 4x faster in fp32
            q, k, v = q.float(), k.float(), v.float()
        gqa = q.shape[0] != k.shape[0]
        out = scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa
        )
        return out[0].to(dtype)
    group = q.shape[0] // k.shape[0]
    if mask is None:
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    return _softcapped(q, k, v, mask, scale, softcap)


def _attend_decodes(
    batch: Batch,
    layer: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """The sequences that add one token each, together -> [heads, number of them, d_v].

    The heads that share a key head stand as that many query positions of it, so that keys are never repeated.
    """
    rows = batch.decode_rows
    if batch.kv is None or all(s.context == 1 for s in batch.decodes):  # nothing before: each sees itself alone
        return v[:, rows].repeat_interleave(q.shape[0] // v.shape[0], 0)
    if softcap is None and ops.usable(q):
        return ops.decode_attention(q[:, rows], *batch.kv.layer(layer), batch, scale, window)
    k_all, v_all = batch.kv.read_many(layer, batch.decode_tables)  # [n, S, kv_heads, ..]
    heads, kv_heads = q.shape[0], k.shape[0]
    grouped = q[:, rows].transpose(0, 1).reshape(len(rows), kv_heads, heads // kv_heads, -1)
    mask = batch.decode_mask(window)[:, None, None, :]
    if softcap is None:
        out = scaled_dot_product_attention(
            grouped, k_all.transpose(1, 2), v_all.transpose(1, 2), attn_mask=mask, scale=scale
        )
    else:
        out = _softcapped(grouped, k_all.transpose(1, 2), v_all.transpose(1, 2), mask, scale, softcap)
    return out.reshape(len(rows), heads, -1).transpose(0, 1)


def _softcapped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    """Scores squashed to (-softcap, softcap), as Gemma 2 does, before the mask."""
    scores = torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap)) * softcap
    weights = scores.float().masked_fill(~mask, float("-inf")).softmax(-1)
    return weights.to(v.dtype) @ v
