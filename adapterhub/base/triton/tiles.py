"""The LoRA op where many rows are one adapter's, tile by tile, and its backward; of all linears that read the same x.

Forward: shrink makes `low = x @ A.T`, expand adds `low @ B` to y. Backward, `slope` being the gradient of y: the same
shrink makes `middle = slope @ B.T`, since B is stored as A is; expand_back makes x's gradient, `middle @ A` summed over
the linears; A's gradient is `middle.T @ x`, B's `low.T @ slope`, and one program goes over all rows of a job for some
columns of one of them. Nothing is added atomically. A tile has rows of one adapter alone, whose numbers reach no other.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from adapterhub.base.triton.finding import Linears, add, columns_of, find
from adapterhub.base.triton.learning import Gradients
from adapterhub.base.triton.tables import TILE, Tables, in_fp32

_RANKS = 16  # rows of B that a program works on at a time; what `low` has room for is a multiple
_MOST_RANKS = 64  # rows of A, or of a gradient
_STEP = 512  # columns, of which a part of a sum has a multiple
_SPLITS = 8  # most parts
_PROGRAMS = 256  # that keep a device busy without parts
_LEARNED_SPLITS = 4  # most parts in training, and the fewest columns of one, as every program of expand reads them all
_LEARNED_PART = 2048
_PIECE = 64  # columns of A and x in one product
_COLUMNS = 64  # of what a program adds to


def shrink(x: torch.Tensor, pool: torch.Tensor, tables: Tables, linears: Linears, *, learning: bool) -> torch.Tensor:
    """x [T, n_in] @ A.T -> [parts, T, linears, room for ranks] in fp32, to be summed over the parts. While `learning`,
    how many there are depends on the linears alone, so that a job's numbers are its own, bit for bit."""
    if learning:
        part = _learned_part(linears.n_in)
    else:
        part = _part(linears.n_in, min(_SPLITS, triton.cdiv(_PROGRAMS, len(tables.lora_tiles) * linears.count)))
    return _shrink(x, pool, tables, linears, linears.n_in, part, back=False)


def shrink_back(slope: torch.Tensor, pool: torch.Tensor, tables: Tables, linears: Linears) -> torch.Tensor:
    """slope [T, sum of widths], each linear's columns @ B.T -> as `shrink`."""
    return _shrink(slope, pool, tables, linears, linears.widest, _learned_part(linears.widest), back=True)


def expand(
    y: torch.Tensor,
    low: torch.Tensor,
    pool: torch.Tensor,
    tables: Tables,
    linears: Linears,
    kept: torch.Tensor | None = None,
) -> None:
    """Adds low @ B of each linear to its columns of y [T, sum of widths]. Writes the sum of low's parts to `kept`
    [T, linears, room], as far as there are ranks, for `add_gradients`."""
    columns = triton.cdiv(linears.widest, _COLUMNS)
    splits, rows, count, room = low.shape
    _expand_tiles[len(tables.lora_tiles), count * columns](
        y, low, kept, pool, tables.adapters, tables.lora_tiles, *linears.lookups(tables), y.stride(0), columns, rows,
        room, SPLITS=splits, ALIGNED=tables.sizes.aligned, EXACT=in_fp32(y), BLOCK_M=TILE, BLOCK_R=_RANKS,
        BLOCK_N=_COLUMNS, num_stages=1,
    )  # fmt: skip


def expand_back(
    gradient: torch.Tensor,
    middle: torch.Tensor,
    pool: torch.Tensor,
    tables: Tables,
    linears: Linears,
    kept: torch.Tensor,
) -> None:
    """Writes middle @ A, summed over the linears, into gradient [T, n_in], in the rows that have an adapter. Keeps what
    `expand` keeps, of middle."""
    splits, rows, _, room = middle.shape
    _expand_back[len(tables.lora_tiles), triton.cdiv(linears.n_in, _COLUMNS)](
        gradient, middle, kept, pool, tables.adapters, tables.lora_tiles, *linears.lookups(tables), rows, room,
        SPLITS=splits, ALIGNED=tables.sizes.aligned, EXACT=in_fp32(gradient), BLOCK_M=TILE, BLOCK_R=_RANKS,
        BLOCK_N=_COLUMNS, num_stages=1,
    )  # fmt: skip


def add_gradients(
    gradients: Gradients,
    x: torch.Tensor,
    slope: torch.Tensor,
    low: torch.Tensor,
    middle: torch.Tensor,
    tables: Tables,
    linears: Linears,
) -> None:
    """Adds middle.T @ x to A's gradients and low.T @ slope to B's, of each linear and job; low and middle as kept."""
    columns = [triton.cdiv(width, _COLUMNS) for width in (linears.n_in, linears.widest)]
    room = low.shape[2]
    _add_gradients[len(gradients.rows), linears.count * sum(columns)](
        gradients.flat, x, slope, low, middle, gradients.rows, gradients.a, gradients.b, *linears.lookups(tables)[1:],
        slope.stride(0), *columns, room,
        ALIGNED=tables.sizes.aligned, EXACT=in_fp32(x), BLOCK_M=TILE,
        BLOCK_R=min(_MOST_RANKS, triton.next_power_of_2(room)), BLOCK_N=_COLUMNS,
    )  # fmt: skip


def _part(width: int, most: int) -> int:
    """Columns of a part, of which there are `most`."""
    return triton.cdiv(width, most * _STEP) * _STEP


def _learned_part(width: int) -> int:
    return max(_LEARNED_PART, _part(width, _LEARNED_SPLITS))


def _shrink(
    x: torch.Tensor, pool: torch.Tensor, tables: Tables, linears: Linears, width: int, part: int, *, back: bool
) -> torch.Tensor:
    rows, tiles, exact = len(x), len(tables.lora_tiles), in_fp32(x)
    splits, room = triton.cdiv(width, part), triton.cdiv(tables.sizes.rank, _RANKS) * _RANKS
    low = torch.empty(splits, rows, linears.count, room, dtype=torch.float32, device=x.device)
    _shrink_tiles[tiles, linears.count, splits](
        low, x, pool, tables.adapters, tables.lora_tiles, *linears.lookups(tables), x.stride(0), rows, room,
        BACK=back, PART=part, ALIGNED=tables.sizes.aligned, EXACT=exact, BLOCK_M=TILE, BLOCK_K=_PIECE,
        BLOCK_R=min(_MOST_RANKS, triton.next_power_of_2(room)), num_warps=8 if exact else 4,
    )  # fmt: skip
    return low


@triton.jit(do_not_specialize=["first", "rows"])
def _shrink_tiles(
    low_ptr, x_ptr, pool_ptr, adapters_ptr, tiles_ptr, offsets_ptr, ranks_ptr, targets, first, starts_ptr, count, n_in,
    x_stride, rows, room, BACK: tl.constexpr, PART: tl.constexpr, ALIGNED: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """low [splits, rows, count, room]: one part of the sums of one tile's rows and one linear. BACK: over B, and the
    linear's own columns of x."""
    tile, member, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(tiles_ptr + 2 * tile)
    length = (tl.load(tiles_ptr + 2 * tile + 1) - row).to(tl.int32)
    at, rank = find(row, adapters_ptr, offsets_ptr, ranks_ptr, targets, first + member, ALIGNED)
    x_ptr += row * x_stride
    a_ptr = pool_ptr + at
    width = n_in
    if BACK:
        a_ptr += rank * n_in
        start, width = columns_of(starts_ptr, member, ALIGNED)
        x_ptr += start
    low_ptr += ((split * rows + row) * count + member) * room
    m = tl.arange(0, BLOCK_M)
    begin = split * PART
    end = min(begin + PART, width)
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        low = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for k0 in range(begin, end, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            x_mask = (m[:, None] < length) & (k[None, :] < end)
            x = tl.load(x_ptr + m[:, None] * x_stride + k[None, :], mask=x_mask, other=0.0)
            a_mask = (k[:, None] < end) & (r[None, :] < rank)
            a = tl.load(a_ptr + k[:, None] + r[None, :] * width, mask=a_mask, other=0.0)
            if EXACT:
                x, a = x.to(tl.float32), a.to(tl.float32)
            low = tl.dot(x, a, low, input_precision="ieee")
        low_mask = (m[:, None] < length) & (r[None, :] < room)  # zeros from the rank on
        tl.store(low_ptr + m[:, None] * (count * room) + r[None, :], low, mask=low_mask)


@triton.jit
def _expanded(
    delta, low_ptr, kept_ptr, keeps, b_ptr, rank, n, width, length, row_stride, split_stride,
    SPLITS: tl.constexpr, EXACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """delta + low @ B[:, n], low being the sum of the parts that shrink wrote. One program `keeps` it."""
    m = tl.arange(0, BLOCK_M)
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        at = m[:, None] * row_stride + r[None, :]
        low_mask = m[:, None] < length
        low = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for split in tl.static_range(SPLITS):
            low += tl.load(low_ptr + split * split_stride + at, mask=low_mask, other=0.0)
        if kept_ptr is not None:
            tl.store(kept_ptr + at, low.to(kept_ptr.dtype.element_ty), mask=low_mask & keeps)
        b_mask = (r[:, None] < rank) & (n[None, :] < width)
        b = tl.load(b_ptr + r[:, None] * width + n[None, :], mask=b_mask, other=0.0).to(tl.float32)
        # tf32x3 makes three products of 10-bit parts, which is as good as fp32 and runs on the tensor cores
        delta = tl.dot(low, b, delta, input_precision="ieee" if EXACT else "tf32x3")
    return delta


@triton.jit(do_not_specialize=["first", "rows"])
def _expand_tiles(
    y_ptr, low_ptr, kept_ptr, pool_ptr, adapters_ptr, tiles_ptr, offsets_ptr, ranks_ptr, targets, first, starts_ptr,
    count, n_in, y_stride, columns, rows, room, SPLITS: tl.constexpr, ALIGNED: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of one tile's rows and one linear."""
    member, n0 = tl.program_id(1) // columns, tl.program_id(1) % columns * BLOCK_N
    start, n_out = columns_of(starts_ptr, member, ALIGNED)
    row = tl.load(tiles_ptr + 2 * tl.program_id(0))
    length = (tl.load(tiles_ptr + 2 * tl.program_id(0) + 1) - row).to(tl.int32)
    at, rank = find(row, adapters_ptr, offsets_ptr, ranks_ptr, targets, first + member, ALIGNED)
    if (rank == 0) | (n0 >= n_out):
        return
    m, n = tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    low_ptr += (row * count + member) * room
    if kept_ptr is not None:
        kept_ptr += (row * count + member) * room
    delta = _expanded(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), low_ptr, kept_ptr, n0 == 0, pool_ptr + at + rank * n_in, rank, n,
        n_out, length, count * room, rows.to(tl.int64) * (count * room), SPLITS, EXACT, BLOCK_M, BLOCK_R,
    )  # fmt: skip
    mask = (m[:, None] < length) & (n[None, :] < n_out)
    add(y_ptr + row * y_stride + start + m[:, None] * y_stride + n[None, :], delta, mask)


@triton.jit(do_not_specialize=["first", "rows"])
def _expand_back(
    gradient_ptr, middle_ptr, kept_ptr, pool_ptr, adapters_ptr, tiles_ptr, offsets_ptr, ranks_ptr, targets, first,
    starts_ptr, count, n_in, rows, room, SPLITS: tl.constexpr, ALIGNED: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of one tile's rows, over all linears."""
    row = tl.load(tiles_ptr + 2 * tl.program_id(0))
    length = (tl.load(tiles_ptr + 2 * tl.program_id(0) + 1) - row).to(tl.int32)
    m, n = tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    delta = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for member in range(count):
        at, rank = find(row, adapters_ptr, offsets_ptr, ranks_ptr, targets, first + member, ALIGNED)
        middle_at = (row * count + member) * room
        delta = _expanded(
            delta, middle_ptr + middle_at, kept_ptr + middle_at, tl.program_id(1) == 0, pool_ptr + at, rank, n, n_in,
            length, count * room, rows.to(tl.int64) * (count * room), SPLITS, EXACT, BLOCK_M, BLOCK_R,
        )  # fmt: skip
    ptrs = gradient_ptr + row * n_in + m[:, None] * n_in + n[None, :]
    tl.store(ptrs, delta.to(gradient_ptr.dtype.element_ty), mask=(m[:, None] < length) & (n[None, :] < n_in))


@triton.jit
def _add_product(
    gradient_ptr, at, low_ptr, x_ptr, rank, n0, width, length, x_stride, low_stride,
    EXACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds low.T @ x[:, n0:] to a gradient [rank, width] at `at`; nothing where that is nowhere."""
    n = n0 + tl.arange(0, BLOCK_N)
    if (at >= 0) & (n0 < width):
        filled = tl.cdiv(rank, 16) * 16  # of low; loads of several numbers need to know that it is a multiple
        for r0 in range(0, rank, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            total = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
            for m0 in range(0, length, BLOCK_M):
                m = m0 + tl.arange(0, BLOCK_M)
                low_mask = (r[:, None] < filled) & (m[None, :] < length)
                low_ptrs = low_ptr + m[None, :].to(tl.int64) * low_stride + r[:, None]
                low = tl.load(low_ptrs, mask=low_mask, other=0.0)
                x_mask = (m[:, None] < length) & (n[None, :] < width)
                x_ptrs = x_ptr + m[:, None].to(tl.int64) * x_stride + n[None, :]
                x = tl.load(x_ptrs, mask=x_mask, other=0.0)
                if EXACT:
                    low, x = low.to(tl.float32), x.to(tl.float32)
                total = tl.dot(low, x, total, input_precision="ieee")
            mask = (r[:, None] < rank) & (n[None, :] < width)
            add(gradient_ptr + at + r[:, None] * width + n[None, :], total, mask)


@triton.jit(do_not_specialize=["first"])
def _add_gradients(
    gradient_ptr, x_ptr, slope_ptr, low_ptr, middle_ptr, jobs_ptr, a_ptr, b_ptr, ranks_ptr, targets, first, starts_ptr,
    count, n_in, slope_stride, columns_in, columns_out, room, ALIGNED: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of the gradient of A or B, of one linear and one job."""
    job = tl.program_id(0)
    member = tl.program_id(1) // (columns_in + columns_out)
    column = tl.program_id(1) % (columns_in + columns_out)
    row = tl.load(jobs_ptr + 2 * job)
    length = (tl.load(jobs_ptr + 2 * job + 1) - row).to(tl.int32)
    rank = tl.load(ranks_ptr + job).to(tl.int32)
    low_at = (row * count + member) * room
    if column < columns_in:
        at = tl.load(a_ptr + job * targets + first + member)
        if ALIGNED:
            at = tl.multiple_of(at, 8)
        _add_product(
            gradient_ptr, at, middle_ptr + low_at, x_ptr + row * n_in, rank, column * BLOCK_N, n_in, length, n_in,
            count * room, EXACT, BLOCK_M, BLOCK_R, BLOCK_N,
        )  # fmt: skip
    else:
        at = tl.load(b_ptr + job * targets + first + member)
        if ALIGNED:
            at = tl.multiple_of(at, 8)
        start, n_out = columns_of(starts_ptr, member, ALIGNED)
        _add_product(
            gradient_ptr, at, low_ptr + low_at, slope_ptr + row * slope_stride + start, rank,
            (column - columns_in) * BLOCK_N, n_out, length, slope_stride, count * room,
            EXACT, BLOCK_M, BLOCK_R, BLOCK_N,
        )  # fmt: skip
