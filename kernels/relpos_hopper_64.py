"""`relpos_hopper` for heads of 64: a program per two image rows of queries, one row of keys and values a stage.

Every row of keys and values in shared memory meets both blocks, which halves the traffic of keys and values from L2.
Two programs run on a multiprocessor: 114,760 bytes of shared memory and 250 registers a thread. The halves of the table
of columns are 64 apart, so of each pair of products one is wanted, and the skew is a turn of each query's terms.

The row term is not added to the scores, nor in the maximum: exp2 of it, rounded to bfloat16, multiplies the weights
when they are bfloat16, two at a time, where the addition takes an instruction for each. A program with a factor above
2^60 or a sum below 2^-40 sets its flag, too.
"""

# ruff: noqa: N803, N806
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .relpos_hopper import describe, takes, wait_for_all
from .tiles import Tile


@gluon.jit
def _start(q, side, SCORES: gl.constexpr):
    return warpgroup_mma(q, side.permute((1, 0)), gl.zeros([64, 64], gl.float32, SCORES), use_acc=False, is_async=True)


@gluon.jit
def _store_terms(q, left, right, rows, terms, rel_h, SCORES: gl.constexpr):
    """Stores a block's terms: those of columns to `terms`, turned by the query's own column, those of rows by query."""
    low = _start(q, left, SCORES)
    high = _start(q, right, SCORES)
    by_row = _start(q, rows, SCORES)
    low, high, by_row = warpgroup_mma_wait(0, [low, high, by_row])
    i = gl.arange(0, 64, gl.SliceLayout(1, SCORES))[:, None]
    key = i + 63 - gl.arange(0, 64, gl.SliceLayout(0, SCORES))[None, :]  # below 64 by the left half of the table
    gl.store(terms + i * 64 + key % 64, gl.where(key < 64, low, high) * 1.4426950408889634)
    by_query: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0, 1])
    by_row *= 1.4426950408889634
    # beyond 2^60 infinite, so that the sum tells: a weight too small for float32 might matter there
    by_row = gl.where(by_row < 60.0, gl.exp2(by_row), float("inf")).to(gl.bfloat16).to(gl.float32)
    rel_h._reinterpret(gl.float32, [64, 64], by_query).store(by_row)


@gluon.jit
def _load_column_terms(terms, SCORES: gl.constexpr):
    i = gl.arange(0, 64, gl.SliceLayout(1, SCORES))
    n = gl.arange(0, 64, gl.SliceLayout(0, SCORES))
    return gl.load(terms + i[:, None] * 64 + n[None, :])


@gluon.jit
def _like(x, y):
    return gl.convert_layout(x, y.type.layout)


@gluon.jit
def _block_weights(
    s, rel_w, rel_h, column, total, scale_log2, SCORES: gl.constexpr, OPERAND: gl.constexpr
):  # fmt: skip
    of_row = rel_h.index(column).permute((1, 0)).load(SCORES)  # [64, 1]
    p = gl.exp2(s * scale_log2 + rel_w)
    sums = gl.sum(p.reshape([64, 8, 8]), 1)
    total += sums * _like(of_row, sums)
    p = p.to(gl.bfloat16) * of_row.to(gl.bfloat16)
    return gl.convert_layout(p, OPERAND), total


@gluon.jit
def _finish(acc, total, starts, SUM: gl.constexpr, HEADS: gl.constexpr):
    """Stores a block of the output; 1 if its sums are no sums to trust, else 0."""
    sums = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, SUM))
    i = gl.arange(0, 64, gl.SliceLayout(1, SUM))
    columns = gl.arange(0, 64, gl.SliceLayout(0, SUM))
    gl.store(starts + i[:, None] * (HEADS * 64) + columns[None, :], (acc / sums[:, None]).to(starts.dtype.element_ty))
    trusted = (sums < 1.152921504606847e18) & (sums > 9.094947017729282e-13)  # 2^60 and 2^-40, and not NaN
    return gl.max(1 - trusted.to(gl.int32), 0)


@gluon.jit
def hopper_64_kernel(
    queries, rows, tables_h, tables_w, scratch, out, flags, scale_log2,
    HEADS: gl.constexpr, GH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A program per (two image rows of queries, head, image), of one warpgroup; STAGES is 4 or more."""
    BYTES: gl.constexpr = 64 * 64 * 2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    WIDE: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    tile, head, image = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    token = image * GH * 64
    k_column = (HEADS + head) * 64
    v_column = (2 * HEADS + head) * 64

    q = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], WIDE)
    keys = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, 64], WIDE)
    values = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, 64], WIDE)  # the tables until the first values come
    by_query: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    rel_h0 = gl.allocate_shared_memory(gl.float32, [64, 1, 64], by_query)
    rel_h1 = gl.allocate_shared_memory(gl.float32, [64, 1, 64], by_query)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(slot), count=1)
        mbarrier.init(v_ready.index(slot), count=1)
    mbarrier.init(q_ready, count=1)
    fence_async_shared()
    wait_for_all()

    mbarrier.expect(q_ready, 6 * BYTES)
    for slot in gl.static_range(STAGES):
        mbarrier.expect(k_ready.index(slot), BYTES)
    for block in gl.static_range(2):
        tma.async_copy_global_to_shared(queries, [token + tile * 128 + block * 64, head * 64], q_ready, q.index(block))
        tma.async_copy_global_to_shared(tables_w, [block * 64, 0], q_ready, values.index(block))
        tma.async_copy_global_to_shared(tables_h, [tile * 2 + block, 0], q_ready, values.index(2 + block))
    for slot in gl.static_range(STAGES):
        tma.async_copy_global_to_shared(rows, [token + slot * 64, k_column], k_ready.index(slot), keys.index(slot))
    mbarrier.wait(q_ready, 0)

    program = (image * HEADS + head) * gl.num_programs(0) + tile
    terms = scratch + program.to(gl.int64) * (2 * 64 * 64)
    q0 = q.index(0)
    q1 = q.index(1)
    _store_terms(q0, values.index(0), values.index(1), values.index(2), terms, rel_h0, SCORES)
    _store_terms(q1, values.index(0), values.index(1), values.index(3), terms + 64 * 64, rel_h1, SCORES)
    for slot in gl.static_range(STAGES - 1):  # sums stay in flight, so a slot of values is free one row later
        mbarrier.expect(v_ready.index(slot), BYTES)
    wait_for_all()
    for slot in gl.static_range(STAGES - 1):
        tma.async_copy_global_to_shared(rows, [token + slot * 64, v_column], v_ready.index(slot), values.index(slot))
    rel_w0 = _load_column_terms(terms, SCORES)
    rel_w1 = _load_column_terms(terms + 64 * 64, SCORES)

    mbarrier.wait(k_ready.index(0), 0)
    s0 = _start(q0, keys.index(0), SCORES)
    s1 = _start(q1, keys.index(0), SCORES)
    s0, s1 = warpgroup_mma_wait(0, [s0, s1])
    rel_w0 -= gl.max(s0 * scale_log2 + rel_w0, 1)[:, None]
    rel_w1 -= gl.max(s1 * scale_log2 + rel_w1, 1)[:, None]
    zero = gl.zeros([64, 64], gl.float32, SCORES)
    total0 = gl.sum(zero.reshape([64, 8, 8]), 1)
    total1 = gl.sum(zero.reshape([64, 8, 8]), 1)
    acc0 = warpgroup_mma_init(zero)
    acc1 = warpgroup_mma_init(zero)
    for row in range(GH):
        here = row % STAGES
        later = (row + 1) % STAGES
        free = (row + STAGES - 1) % STAGES  # of values, at the end: those of the row before have been multiplied
        column = GH - 1 - row
        s1 = _start(q1, keys.index(here), SCORES)
        p0, total0 = _block_weights(s0, rel_w0, rel_h0, column, total0, scale_log2, SCORES, OPERAND)
        mbarrier.wait(v_ready.index(here), (row // STAGES) & 1)
        mbarrier.wait(k_ready.index(later), ((row + 1) // STAGES) & 1)
        s1 = warpgroup_mma_wait(0, [s1])
        acc0 = warpgroup_mma(p0, values.index(here), acc0, is_async=True)
        s0 = _start(q0, keys.index(later), SCORES)
        p1, total1 = _block_weights(s1, rel_w1, rel_h1, column, total1, scale_log2, SCORES, OPERAND)
        acc1 = warpgroup_mma(p1, values.index(here), acc1, is_async=True)
        s0 = warpgroup_mma_wait(1, [s0])
        more = row + STAGES <= GH  # keys go one row past the last, for scores that nobody reads
        mbarrier.expect(k_ready.index(here), BYTES, pred=more)
        mbarrier.expect(v_ready.index(free), BYTES, pred=more)
        wait_for_all()
        k_token = token + (row + STAGES) * 64
        v_token = k_token - 64
        tma.async_copy_global_to_shared(rows, [k_token, k_column], k_ready.index(here), keys.index(here), pred=more)
        tma.async_copy_global_to_shared(rows, [v_token, v_column], v_ready.index(free), values.index(free), pred=more)

    acc0, acc1 = warpgroup_mma_wait(0, [acc0, acc1])
    starts = out + (token + tile * 128).to(gl.int64) * (HEADS * 64) + head * 64
    unsafe = _finish(acc0, total0, starts, SCORES, HEADS)
    unsafe = gl.maximum(unsafe, _finish(acc1, total1, starts + 64 * HEADS * 64, SCORES, HEADS))
    gl.store(flags + program, unsafe)


def suits_64(qkv: torch.Tensor, grid: tuple[int, int], tile: Tile) -> bool:
    """Whether this kernel takes these inputs: heads of 64, slots for the tables, rows for all slots."""
    slots_fit = 4 <= tile.num_stages <= grid[0]
    return (tile.block_m, tile.num_warps, qkv.shape[-1]) == (128, 4, 64) and slots_fit and takes(qkv, grid)


def launch_64(
    qkv: torch.Tensor,
    rel_pos_h: torch.Tensor,
    rel_pos_w: torch.Tensor,
    out: torch.Tensor,
    gh: int,
    scale_log2: float,
    tile: Tile,
) -> torch.Tensor:
    """Fills `out`; [B, heads, gh / 2] int32, not 0 where those rows of it must be computed again."""
    batch, tokens, _, heads, _ = qkv.shape
    matrix = qkv.as_strided((batch * tokens, 3 * heads * 64), (qkv.stride(1), 1))
    sources = [describe(values, 64, 64) for values in (matrix, matrix, rel_pos_h, rel_pos_w)]
    scratch = qkv.new_empty(batch * heads * tokens, 64, dtype=torch.float32)
    unsafe = qkv.new_empty(batch, heads, gh // 2, dtype=torch.int32)
    hopper_64_kernel[(gh // 2, heads, batch)](
        *sources, scratch, out, unsafe, scale_log2,
        HEADS=heads, GH=gh, STAGES=tile.num_stages,
        num_warps=4, maxnreg=tile.max_registers,
    )  # fmt: skip
    return unsafe
