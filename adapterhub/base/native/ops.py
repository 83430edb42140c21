"""The native LoRA op and decode attention one by one, for models whose whole step is not native: bf16 on a CPU."""

from __future__ import annotations

from typing import cast

import torch

from adapterhub.base.batch import Batch, PooledAdapter, Segment
from adapterhub.base.native import best_isa, library
from adapterhub.base.native.structs import Segment as NativeSegment
from adapterhub.base.native.structs import address


def usable(x: torch.Tensor) -> bool:
    """Whether the ops take numbers such as `x`, here and now: they have no backward."""
    here = x.device.type == "cpu" and x.dtype is torch.bfloat16
    return here and not torch.is_grad_enabled() and library() is not None


def segment(of: Segment) -> NativeSegment:
    adapter = cast(PooledAdapter, of.adapter)
    return NativeSegment(of.start, of.end, adapter.rank, address(adapter.offsets))


def lora(x: torch.Tensor, n_out: int, batch: Batch, target: int) -> torch.Tensor:
    """The segments' deltas [T, n_out] in fp32 for linear number `target` of the base's; x [T, n_in]."""
    built = library()
    assert built is not None
    assert batch.pool is not None
    x = x.contiguous()
    delta = torch.zeros(len(x), n_out)
    segments = (NativeSegment * len(batch.segments))(*map(segment, batch.segments))
    built.adapterhub_lora(
        best_isa(), address(batch.pool), segments, len(segments), target, address(x), x.shape[1], address(delta), n_out
    )
    return delta


def decode_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, scale: float, window: int | None
) -> torch.Tensor:
    """q [heads, n, d] of the batch's decodes; keys and values [slots, kv_heads, ..] of a layer -> [heads, n, d_v]."""
    built = library()
    assert built is not None
    heads, count, dim = q.shape
    kv_heads, value_dim = values.shape[1], values.shape[2]
    q = q.transpose(0, 1).contiguous()
    tables = batch.decode_tables.int()
    table_at = torch.arange(count, dtype=torch.int32) * tables.shape[1]
    contexts = torch.tensor([span.context for span in batch.decodes], dtype=torch.int32)
    out = torch.empty(count, heads, value_dim)
    built.adapterhub_attention(
        best_isa(),
        kv_heads,
        heads // kv_heads,
        dim,
        value_dim,
        scale,
        address(q),
        address(keys),
        address(values),
        address(tables),
        address(table_at),
        address(contexts),
        count,
        window or 0,
        address(out),
    )
    return out.to(q.dtype).transpose(0, 1)
