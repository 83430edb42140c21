"""The LoRA op over blocks in the pool: `y[t] += (x[t] @ A.T) @ B`, for all linears that read the same x in one go.

Two launches: shrink writes `x[t] @ A.T` in fp32, in parts when n_in is long; expand adds up the parts and multiplies
by B. Prompts go in tiles of many rows (`tiles.py`). Decoding, every row goes by itself, here; where n_in is short, in
one launch: every program of expand makes its own `x[t] @ A.T` anew, from the cache. How a decoded row's sums are split
depends on the linear alone and nothing is added atomically, so that its delta is the same bit for bit whatever else is
in the batch. Ranks are read on the device and looped over: nothing is padded to the largest.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from adapterhub.base.triton import tiles
from adapterhub.base.triton.finding import Linears, add, columns_of, find
from adapterhub.base.triton.tables import Tables

_RANKS = 16  # rows of A that a program works on at a time
_COLUMNS = 512  # of A or B that a program works on at a time
_FUSED = 2 * _COLUMNS  # longest n_in for which making `x @ A.T` anew costs less than another launch
_SPLITS = 8  # most parts of n_in


def add_lora(
    y: torch.Tensor, x: torch.Tensor, pool: torch.Tensor, tables: Tables, first: int, widths: tuple[int, ...]
) -> torch.Tensor:
    """Adds to `y` [T, sum of widths], in place, the deltas of the base's linears `first`, `first + 1`, ..., which are
    `widths` wide and all read `x` [T, n_in]; of one dtype with `pool`. Returns y."""
    x, linears = x.contiguous(), Linears(first, x.shape[1], widths)
    if tables.decoding:
        _add_to_rows(y, x, pool, tables, linears)
    else:
        low = tiles.shrink(x, pool, tables, linears, learning=False)
        tiles.expand(y, low, pool, tables, linears)
    return y


def _add_to_rows(y: torch.Tensor, x: torch.Tensor, pool: torch.Tensor, tables: Tables, linears: Linears) -> None:
    rows, n_in = x.shape
    lookups, aligned, count = linears.lookups(tables), tables.sizes.aligned, linears.count
    columns = triton.cdiv(linears.widest, _COLUMNS)
    if n_in <= _FUSED:
        _rows[rows, count * columns](
            y, x, pool, tables.adapters, *lookups, y.stride(0), columns,
            ALIGNED=aligned, BLOCK_R=_RANKS, BLOCK_K=_COLUMNS, BLOCK_N=_COLUMNS, num_warps=8,
        )  # fmt: skip
        return
    part = triton.cdiv(n_in, _SPLITS * _COLUMNS) * _COLUMNS
    splits, room = triton.cdiv(n_in, part), triton.cdiv(tables.sizes.rank, _RANKS) * _RANKS
    low = torch.empty(splits, rows, count, room, dtype=torch.float32, device=x.device)
    _shrink_rows[rows, count, splits](
        low, x, pool, tables.adapters, *lookups, rows, room,
        PART=part, ALIGNED=aligned, BLOCK_R=_RANKS, BLOCK_K=_COLUMNS,
    )  # fmt: skip
    _expand_rows[rows, count * columns](
        y, low, pool, tables.adapters, *lookups, y.stride(0), columns, rows, room,
        SPLITS=splits, ALIGNED=aligned, BLOCK_R=_RANKS, BLOCK_N=_COLUMNS, num_warps=8,
    )  # fmt: skip


@triton.jit
def _shrink_row(x_ptr, a_ptr, rank, r, n_in, begin, end, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """x[begin:end] @ A[r, begin:end].T in fp32; r [BLOCK_R] are rows of A."""
    total = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for k0 in range(begin, end, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + k, mask=k < end, other=0.0).to(tl.float32)
        mask = (r[:, None] < rank) & (k[None, :] < end)
        a = tl.load(a_ptr + r[:, None] * n_in + k[None, :], mask=mask, other=0.0).to(tl.float32)
        total += a * x[None, :]
    return tl.sum(total, axis=1)


@triton.jit
def _expand_row(low, b_ptr, rank, r, n, n_out):
    """low [BLOCK_R] times the rows r of B, at the columns n."""
    mask = (r[:, None] < rank) & (n[None, :] < n_out)
    b = tl.load(b_ptr + r[:, None] * n_out + n[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.sum(low[:, None] * b, axis=0)


@triton.jit(do_not_specialize=["first"])
def _rows(
    y_ptr, x_ptr, pool_ptr, adapters_ptr, offsets_ptr, ranks_ptr, targets, first, starts_ptr, count, n_in, y_stride,
    columns, ALIGNED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of one row and one linear: shrink and expand together."""
    row = tl.program_id(0).to(tl.int64)
    member, n0 = tl.program_id(1) // columns, tl.program_id(1) % columns * BLOCK_N
    start, n_out = columns_of(starts_ptr, member, ALIGNED)
    at, rank = find(row, adapters_ptr, offsets_ptr, ranks_ptr, targets, first + member, ALIGNED)
    if (rank == 0) | (n0 >= n_out):
        return
    a_ptr = pool_ptr + at
    b_ptr = a_ptr + rank * n_in
    n = n0 + tl.arange(0, BLOCK_N)
    delta = tl.zeros((BLOCK_N,), tl.float32)
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        low = _shrink_row(x_ptr + row * n_in, a_ptr, rank, r, n_in, 0, n_in, BLOCK_R, BLOCK_K)
        delta += _expand_row(low, b_ptr, rank, r, n, n_out)
    add(y_ptr + row * y_stride + start + n, delta, n < n_out)


@triton.jit(do_not_specialize=["first", "rows"])
def _shrink_rows(
    low_ptr, x_ptr, pool_ptr, adapters_ptr, offsets_ptr, ranks_ptr, targets, first, starts_ptr, count, n_in, rows, room,
    PART: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """low [splits, rows, count, room]: one part of the sums of one row and one linear."""
    row, member, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    at, rank = find(row, adapters_ptr, offsets_ptr, ranks_ptr, targets, first + member, ALIGNED)
    low_ptr += ((split * rows + row) * count + member) * room
    begin = split * PART
    end = min(begin + PART, n_in)
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        low = _shrink_row(x_ptr + row * n_in, pool_ptr + at, rank, r, n_in, begin, end, BLOCK_R, BLOCK_K)
        tl.store(low_ptr + r, low)


@triton.jit(do_not_specialize=["first", "rows"])
def _expand_rows(
    y_ptr, low_ptr, pool_ptr, adapters_ptr, offsets_ptr, ranks_ptr, targets, first, starts_ptr, count, n_in, y_stride,
    columns, rows, room, SPLITS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of one row and one linear, from what shrink wrote."""
    row = tl.program_id(0).to(tl.int64)
    member, n0 = tl.program_id(1) // columns, tl.program_id(1) % columns * BLOCK_N
    start, n_out = columns_of(starts_ptr, member, ALIGNED)
    at, rank = find(row, adapters_ptr, offsets_ptr, ranks_ptr, targets, first + member, ALIGNED)
    if (rank == 0) | (n0 >= n_out):
        return
    b_ptr = pool_ptr + at + rank * n_in
    n = n0 + tl.arange(0, BLOCK_N)
    delta = tl.zeros((BLOCK_N,), tl.float32)
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        low = tl.zeros((BLOCK_R,), tl.float32)
        for split in tl.static_range(SPLITS):
            low += tl.load(low_ptr + ((split * rows + row) * count + member) * room + r)
        delta += _expand_row(low, b_ptr, rank, r, n, n_out)
    add(y_ptr + row * y_stride + start + n, delta, n < n_out)
