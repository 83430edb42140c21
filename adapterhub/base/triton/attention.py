"""Attention over the paged KV cache: decoding and prompts, grouped heads, windows and softcaps, in one kernel.

A program has the queries of a few neighbouring tokens of one sequence, all heads that share a key head, and goes over
the keys that these see, block by block as the sequence's table says. In a decode step, where that would be too few
programs, each goes over a part of the context and a second kernel joins the parts.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from adapterhub.base.batch import KV_BLOCK
from adapterhub.base.triton.tables import TILE, Tables, in_fp32

_QUERIES = 64  # rows and heads together that a program works on
_LEAST_QUERIES = 16  # in a decode step: what a matrix product takes at least
_KEYS = 32  # that a program looks at together
_PROGRAMS = 256  # that keep a device busy
_MOST_SPLITS = 16


def write_kv(
    keys: torch.Tensor, values: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
) -> None:
    """key [kv_heads, T, d] and value [kv_heads, T, d_v] into keys [slots, kv_heads, d] and values, where `slots` [T] is
    not negative."""
    heads, rows, dim = key.shape
    _write_kv[rows,](
        keys, values, key, value, slots, *key.stride(), *value.stride(), heads, dim, value.shape[2],
        BLOCK_H=triton.next_power_of_2(heads),
        BLOCK_D=triton.next_power_of_2(max(dim, value.shape[2])),
    )  # fmt: skip


def splits_of(rows: int, kv_heads: int) -> int:
    """Into how many parts a decode step's contexts are split, to keep a device busy: a power of two, as Triton's ranges
    are."""
    wanted = max(1, min(_MOST_SPLITS, _PROGRAMS // (rows * kv_heads)))
    return 1 << (wanted.bit_length() - 1)


def attend_paged(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: Tables,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """q [heads, T, d]; keys [slots, kv_heads, d] and values [slots, kv_heads, d_v] of a layer, with the new tokens in
    them -> [T, heads, d_v]. Rows that pad get zeros."""
    heads, rows, dim = q.shape
    kv_heads, value_dim = values.shape[1:]
    group = heads // kv_heads
    block_group = triton.next_power_of_2(group)
    exact = in_fp32(q)
    queries = max(_LEAST_QUERIES if tables.decoding or exact else _QUERIES, block_group)
    block_rows = queries // block_group
    out = torch.empty(rows, heads, value_dim, dtype=q.dtype, device=q.device)
    splits = splits_of(rows, kv_heads) if tables.decoding else 1
    parts = torch.empty(splits, rows, heads, value_dim, dtype=torch.float32, device=q.device) if splits > 1 else out
    sums = torch.empty(2, splits, rows, heads, dtype=torch.float32, device=q.device) if splits > 1 else out
    grid = (rows if tables.decoding else len(tables.tiles) * triton.cdiv(TILE, block_rows), kv_heads, splits)
    _attend[grid](
        parts, sums, q, keys, values, None if tables.decoding else tables.tiles, tables.contexts, tables.firsts,
        tables.blocks, *q.stride(), rows, kv_heads, dim, value_dim, scale, window or 0, softcap or 0.0,
        GROUP=group, BLOCK_G=block_group, BLOCK_T=block_rows, BLOCK_S=_KEYS, PAGE=KV_BLOCK, SPLITS=splits,
        SUB_TILES=triton.cdiv(TILE, block_rows), WINDOW=window is not None, SOFTCAP=softcap is not None,
        BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_V=max(16, triton.next_power_of_2(value_dim)),
        EXACT=exact,
    )  # fmt: skip
    if splits > 1:
        _join[rows, heads](
            out, parts, sums, rows, heads, value_dim, SPLITS=splits, BLOCK_V=triton.next_power_of_2(value_dim)
        )
    return out


@triton.jit
def _write_kv(
    keys_ptr, values_ptr, key_ptr, value_ptr, slots_ptr, k_head, k_row, k_dim, v_head, v_row, v_dim, heads, dim,
    value_dim, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token's keys and values."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    h, d = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
    k_mask, v_mask = (h < heads) & (d < dim), (h < heads) & (d < value_dim)
    k = tl.load(key_ptr + row * k_row + h * k_head + d * k_dim, mask=k_mask)
    tl.store(keys_ptr + (slot * heads + h) * dim + d, k, mask=k_mask)
    v = tl.load(value_ptr + row * v_row + h * v_head + d * v_dim, mask=v_mask)
    tl.store(values_ptr + (slot * heads + h) * value_dim + d, v, mask=v_mask)


@triton.jit(do_not_specialize=["rows"])
def _attend(
    parts_ptr, sums_ptr, q_ptr, keys_ptr, values_ptr, tiles_ptr, contexts_ptr, firsts_ptr, blocks_ptr, q_head, q_row,
    q_dim, rows, kv_heads, dim, value_dim, scale, window, softcap,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, PAGE: tl.constexpr,
    SPLITS: tl.constexpr, SUB_TILES: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Some rows of one sequence, the heads of one key head, one part of the context: [BLOCK_T * BLOCK_G] queries."""
    kv_head, split = tl.program_id(1), tl.program_id(2)
    if tiles_ptr is None:
        begin = tl.program_id(0).to(tl.int64)
        end = begin + 1
    else:
        tile = tl.program_id(0) // SUB_TILES
        begin = tl.load(tiles_ptr + 2 * tile) + tl.program_id(0) % SUB_TILES * BLOCK_T
        end = min(begin + BLOCK_T, tl.load(tiles_ptr + 2 * tile + 1))
        if begin >= end:
            return
    m = tl.arange(0, BLOCK_T * BLOCK_G)
    row, member = begin + m // BLOCK_G, m % BLOCK_G
    head = kv_head * GROUP + member
    there = (row < end) & (member < GROUP)
    context = tl.load(contexts_ptr + row, mask=there, other=0).to(tl.int32)
    last = tl.load(contexts_ptr + end - 1).to(tl.int32)
    sees_from = 0
    if WINDOW:
        sees_from = tl.maximum(tl.load(contexts_ptr + begin).to(tl.int32) - window, 0) // BLOCK_S * BLOCK_S
    if SPLITS > 1:
        part = tl.cdiv(tl.cdiv(last - sees_from, SPLITS), BLOCK_S) * BLOCK_S
        sees_from += split * part
        last = min(sees_from + part, last)
    block_ptr = blocks_ptr + tl.load(firsts_ptr + begin)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    q_ptrs = q_ptr + (row * q_row + head * q_head)[:, None] + d[None, :] * q_dim
    q = tl.load(q_ptrs, mask=there[:, None] & (d[None, :] < dim), other=0.0)
    if EXACT:
        q = q.to(tl.float32)
    best = tl.full((BLOCK_T * BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T * BLOCK_G,), tl.float32)
    out = tl.zeros((BLOCK_T * BLOCK_G, BLOCK_V), tl.float32)
    for s0 in range(sees_from, last, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        slot = tl.load(block_ptr + s // PAGE, mask=s < last, other=0) * PAGE + s % PAGE
        at = slot * kv_heads + kv_head
        k_mask = (d[:, None] < dim) & (s[None, :] < last)
        k = tl.load(keys_ptr + at[None, :] * dim + d[:, None], mask=k_mask, other=0.0)
        v_mask = (s[:, None] < last) & (dv[None, :] < value_dim)
        v = tl.load(values_ptr + at[:, None] * value_dim + dv[None, :], mask=v_mask, other=0.0)
        if EXACT:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if SOFTCAP:
            scores = (2 * tl.sigmoid(2 * scores / softcap) - 1) * softcap  # tanh
        sees = s[None, :] < context[:, None]
        if WINDOW:
            sees = sees & (s[None, :] >= context[:, None] - window)
        scores = tl.where(sees, scores, float("-inf"))
        better = tl.maximum(best, tl.max(scores, 1))
        base = tl.where(better == float("-inf"), 0.0, better)  # a row that has seen nothing yet
        weights = tl.exp(scores - base[:, None])
        shrunk = tl.exp(best - base)
        total = total * shrunk + tl.sum(weights, 1)
        out = out * shrunk[:, None]
        out = tl.dot(weights.to(v.dtype), v, out, input_precision="ieee")
        best = better
    into = (split * rows + row) * (kv_heads * GROUP) + head
    if SPLITS > 1:
        tl.store(sums_ptr + into, best, mask=there)
        tl.store(sums_ptr + SPLITS * rows * kv_heads * GROUP + into, total, mask=there)
    out = out / tl.where(total > 0, total, 1.0)[:, None]
    out_ptrs = parts_ptr + into[:, None] * value_dim + dv[None, :]
    tl.store(out_ptrs, out.to(parts_ptr.dtype.element_ty), mask=there[:, None] & (dv[None, :] < value_dim))


@triton.jit(do_not_specialize=["rows"])
def _join(out_ptr, parts_ptr, sums_ptr, rows, heads, value_dim, SPLITS: tl.constexpr, BLOCK_V: tl.constexpr):
    """One head of one row: the parts' averages, weighted by their sums."""
    into = tl.program_id(0).to(tl.int64) * heads + tl.program_id(1)
    split, dv = tl.arange(0, SPLITS), tl.arange(0, BLOCK_V)
    at = split * (rows * heads) + into
    best = tl.load(sums_ptr + at)
    total = tl.load(sums_ptr + SPLITS * rows * heads + at)
    most = tl.max(best, 0)
    most = tl.where(most == float("-inf"), 0.0, most)  # a row that pads
    weight = tl.where(total > 0, total * tl.exp(best - most), 0.0)
    whole = tl.sum(weight, 0)
    parts = tl.load(parts_ptr + at[:, None] * value_dim + dv[None, :], mask=dv[None, :] < value_dim, other=0.0)
    out = tl.sum(parts * weight[:, None], 0) / tl.where(whole > 0, whole, 1.0)
    tl.store(out_ptr + into * value_dim + dv, out.to(out_ptr.dtype.element_ty), mask=dv < value_dim)
