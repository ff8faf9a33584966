"""`relpos_hopper` for heads of 80, as 64 + 16: a program per image row of queries, two rows of keys and values a stage.

A block's sums, weights and terms leave no registers for a second block's; 108,584 bytes of shared memory and 208
registers a thread let two programs run on a multiprocessor, one's prologue under the other's loop. For that the table
of rows is cut to what one image row of queries needs, and queries are held in registers: a product that read both its
operands from shared memory would take all that this gives.
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
def _fetch(
    pairs0, pairs1, tiles0, tiles1, ready, pair, token, column, PAIRS: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Starts the copy of two image rows of keys or values into their slot of the ring."""
    slot = pair % STAGES
    wanted = (pair >= 0) & (pair < PAIRS)
    bar = ready.index(slot)
    mbarrier.expect(bar, 128 * 80 * 2, pred=wanted)
    tma.async_copy_global_to_shared(pairs0, [token + pair * 128, column], bar, tiles0.index(slot), pred=wanted)
    tma.async_copy_global_to_shared(pairs1, [token + pair * 128, column + 64], bar, tiles1.index(slot), pred=wanted)


@gluon.jit
def _start_scores(q0, q1, keys0, keys1, pair, ODD: gl.constexpr, SCORES: gl.constexpr, STAGES: gl.constexpr):
    slot = pair % STAGES
    zero = gl.zeros([64, 64], gl.float32, SCORES)
    s = warpgroup_mma(q0, keys0.index(slot).slice(ODD * 64, 64).permute((1, 0)), zero, use_acc=False, is_async=True)
    return warpgroup_mma(q1, keys1.index(slot).slice(ODD * 64, 64).permute((1, 0)), s, is_async=True)


@gluon.jit
def _start_sum(p, acc0, acc1, values0, values1, pair, ODD: gl.constexpr, STAGES: gl.constexpr):
    slot = pair % STAGES
    acc0 = warpgroup_mma(p, values0.index(slot).slice(ODD * 64, 64), acc0, is_async=True)
    acc1 = warpgroup_mma(p, values1.index(slot).slice(ODD * 64, 64), acc1, is_async=True)
    return acc0, acc1


@gluon.jit
def _multiply(q0, q1, table0, table1, width: gl.constexpr, TERMS: gl.constexpr):
    """[64, width] products of queries with a table, in the base that exp2 wants."""
    zero = gl.zeros([64, width], gl.float32, TERMS)
    products = warpgroup_mma(q0, table0.permute((1, 0)), zero, use_acc=False, is_async=True)
    products = warpgroup_mma(q1, table1.permute((1, 0)), products, is_async=True)
    return warpgroup_mma_wait(0, [products]) * 1.4426950408889634


@gluon.jit
def _row_term(rel_h, row, GH: gl.constexpr, SCORES: gl.constexpr):
    """[64, 1] terms of one row of keys."""
    return rel_h.index(GH - 1 - row).permute((1, 0)).load(SCORES)


@gluon.jit
def _weights(s, rel_w, rel_h_row, total, scale_log2, OPERAND: gl.constexpr):
    p = gl.exp2(s * scale_log2 + (rel_w + rel_h_row))
    total += gl.sum(p.reshape([64, 8, 8]), 1)
    return gl.convert_layout(p.to(gl.bfloat16), OPERAND), total


@gluon.jit
def hopper_80_kernel(
    queries0, queries1, pairs0, pairs1, tables_h0, tables_h1, tables_w0, tables_w1, scratch, out, flags,
    scale_log2,
    HEADS: gl.constexpr, GH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A program per (image row of queries, head, image), of one warpgroup."""
    TOKENS: gl.constexpr = GH * 64
    PAIRS: gl.constexpr = GH // 2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    TERMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    SUM1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    WIDE: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    NARROW: gl.constexpr = gl.NVMMASharedLayout(32, 16)
    tile, head, image = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    token = image * TOKENS
    k_column = (HEADS + head) * 80
    v_column = (2 * HEADS + head) * 80

    q0 = gl.allocate_shared_memory(gl.bfloat16, [64, 64], WIDE)
    keys0 = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 128, 64], WIDE)
    values0 = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 128, 64], WIDE)
    q1 = gl.allocate_shared_memory(gl.bfloat16, [64, 16], NARROW)
    keys1 = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 128, 16], NARROW)
    values1 = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 128, 16], NARROW)
    table_h0 = values0.index(0).slice(0, 64)  # until the first values come
    table_w0 = values0.index(1)
    table_h1 = values1.index(0).slice(0, 64)
    table_w1 = values1.index(1)
    rel_h = gl.allocate_shared_memory(gl.float32, [64, 1, 64], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(slot), count=1)
        mbarrier.init(v_ready.index(slot), count=1)
    mbarrier.init(q_ready, count=1)
    fence_async_shared()
    wait_for_all()

    mbarrier.expect(q_ready, (64 + 64 + 128) * 80 * 2)
    tma.async_copy_global_to_shared(queries0, [token + tile * 64, head * 80], q_ready, q0)
    tma.async_copy_global_to_shared(tables_h0, [tile, 0], q_ready, table_h0)
    tma.async_copy_global_to_shared(tables_w0, [0, 0], q_ready, table_w0)
    tma.async_copy_global_to_shared(queries1, [token + tile * 64, head * 80 + 64], q_ready, q1)
    tma.async_copy_global_to_shared(tables_h1, [tile, 64], q_ready, table_h1)
    tma.async_copy_global_to_shared(tables_w1, [0, 64], q_ready, table_w1)
    for pair in gl.static_range(STAGES):
        _fetch(pairs0, pairs1, keys0, keys1, k_ready, pair, token, k_column, PAIRS, STAGES)
    mbarrier.wait(q_ready, 0)

    program = (image * HEADS + head) * GH + tile
    terms = scratch + program.to(gl.int64) * (64 * 64)
    i_terms = gl.arange(0, 64, gl.SliceLayout(1, TERMS))
    c_terms = gl.arange(0, 128, gl.SliceLayout(0, TERMS))
    products = _multiply(q0, q1, table_w0, table_w1, 128, TERMS)
    key = i_terms[:, None] + 63 - c_terms[None, :]
    gl.store(terms + i_terms[:, None] * 64 + key, products, mask=(key >= 0) & (key < 64))
    products = _multiply(q0, q1, table_h0, table_h1, 64, SCORES)
    by_query: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0, 1])
    rel_h._reinterpret(gl.float32, [64, 64], by_query).store(products)
    q0 = q0.load(OPERAND)
    q1 = q1.load(OPERAND)
    wait_for_all()
    for pair in gl.static_range(STAGES - 1):  # sums stay in flight, so a slot of values is free one pair later
        _fetch(pairs0, pairs1, values0, values1, v_ready, pair, token, v_column, PAIRS, STAGES)
    i = gl.arange(0, 64, gl.SliceLayout(1, SCORES))
    n = gl.arange(0, 64, gl.SliceLayout(0, SCORES))
    rel_w = gl.load(terms + i[:, None] * 64 + n[None, :])

    mbarrier.wait(k_ready.index(0), 0)
    s0 = _start_scores(q0, q1, keys0, keys1, 0, 0, SCORES, STAGES)
    s0 = warpgroup_mma_wait(0, [s0])
    rel_w -= gl.max(s0 * scale_log2 + rel_w, 1)[:, None] + _row_term(rel_h, 0, GH, SCORES)
    total = gl.sum(gl.zeros([64, 64], gl.float32, SCORES).reshape([64, 8, 8]), 1)
    acc0 = warpgroup_mma_init(gl.zeros([64, 64], gl.float32, SCORES))
    acc1 = warpgroup_mma_init(gl.zeros([64, 16], gl.float32, SUM1))
    for pair in range(PAIRS - 1):
        s1 = _start_scores(q0, q1, keys0, keys1, pair, 1, SCORES, STAGES)
        h0 = _row_term(rel_h, 2 * pair, GH, SCORES)
        h1 = _row_term(rel_h, 2 * pair + 1, GH, SCORES)
        p0, total = _weights(s0, rel_w, h0, total, scale_log2, OPERAND)
        mbarrier.wait(v_ready.index(pair % STAGES), (pair // STAGES) & 1)
        mbarrier.wait(k_ready.index((pair + 1) % STAGES), ((pair + 1) // STAGES) & 1)
        s1 = warpgroup_mma_wait(0, [s1])
        acc0, acc1 = _start_sum(p0, acc0, acc1, values0, values1, pair, 0, STAGES)
        s2 = _start_scores(q0, q1, keys0, keys1, pair + 1, 0, SCORES, STAGES)
        p1, total = _weights(s1, rel_w, h1, total, scale_log2, OPERAND)
        acc0, acc1 = _start_sum(p1, acc0, acc1, values0, values1, pair, 1, STAGES)
        s0 = warpgroup_mma_wait(2, [s2])
        wait_for_all()
        _fetch(pairs0, pairs1, keys0, keys1, k_ready, pair + STAGES, token, k_column, PAIRS, STAGES)
        _fetch(pairs0, pairs1, values0, values1, v_ready, pair + STAGES - 1, token, v_column, PAIRS, STAGES)
    s1 = _start_scores(q0, q1, keys0, keys1, PAIRS - 1, 1, SCORES, STAGES)
    h0 = _row_term(rel_h, GH - 2, GH, SCORES)
    h1 = _row_term(rel_h, GH - 1, GH, SCORES)
    p0, total = _weights(s0, rel_w, h0, total, scale_log2, OPERAND)
    mbarrier.wait(v_ready.index((PAIRS - 1) % STAGES), ((PAIRS - 1) // STAGES) & 1)
    acc0, acc1 = _start_sum(p0, acc0, acc1, values0, values1, PAIRS - 1, 0, STAGES)
    s1 = warpgroup_mma_wait(2, [s1])
    p1, total = _weights(s1, rel_w, h1, total, scale_log2, OPERAND)
    acc0, acc1 = _start_sum(p1, acc0, acc1, values0, values1, PAIRS - 1, 1, STAGES)

    sums = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, SCORES))
    unsafe = 1 - (sums < 1.152921504606847e18).to(gl.int32)  # 2^60, or NaN; the first image row alone adds 1 or more
    gl.store(flags + program, gl.max(unsafe, 0))
    starts = out + (token + tile * 64).to(gl.int64) * (HEADS * 80) + head * 80
    acc0, acc1 = warpgroup_mma_wait(0, [acc0, acc1])
    gl.store(starts + i[:, None] * (HEADS * 80) + n[None, :], (acc0 / sums[:, None]).to(out.dtype.element_ty))
    i1 = gl.arange(0, 64, gl.SliceLayout(1, SUM1))
    n1 = 64 + gl.arange(0, 16, gl.SliceLayout(0, SUM1))
    sums1 = gl.convert_layout(sums, gl.SliceLayout(1, SUM1))
    gl.store(starts + i1[:, None] * (HEADS * 80) + n1[None, :], (acc1 / sums1[:, None]).to(out.dtype.element_ty))


def suits_80(qkv: torch.Tensor, grid: tuple[int, int], tile: Tile) -> bool:
    """Whether this kernel takes these inputs: heads of 80, slots for the tables, pairs of rows for all slots."""
    slots_fit = 4 <= 2 * tile.num_stages <= grid[0]
    return (tile.block_m, tile.num_warps, qkv.shape[-1]) == (64, 4, 80) and slots_fit and takes(qkv, grid)


def launch_80(
    qkv: torch.Tensor,
    rel_pos_h: torch.Tensor,
    rel_pos_w: torch.Tensor,
    out: torch.Tensor,
    gh: int,
    scale_log2: float,
    tile: Tile,
) -> torch.Tensor:
    """Fills `out`; [B, heads, gh] int32, not 0 where that row of it must be computed again."""
    batch, tokens, _, heads, _ = qkv.shape
    matrix = qkv.as_strided((batch * tokens, 3 * heads * 80), (qkv.stride(1), 1))
    sources = [
        describe(values, rows, width)
        for values, rows in ((matrix, 64), (matrix, 128), (rel_pos_h, 64), (rel_pos_w, 128))
        for width in (64, 16)
    ]
    scratch = qkv.new_empty(batch * heads * tokens, 64, dtype=torch.float32)
    unsafe = qkv.new_empty(batch, heads, gh, dtype=torch.int32)
    hopper_80_kernel[(gh, heads, batch)](
        *sources, scratch, out, unsafe, scale_log2,
        HEADS=heads, GH=gh, STAGES=tile.num_stages,
        num_warps=4, maxnreg=tile.max_registers,
    )  # fmt: skip
    return unsafe
