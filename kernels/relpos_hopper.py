"""`relpos_global` for Hopper, bfloat16 and 64 tokens a row: products run while earlier scores are exponentiated.

Triton waits for every product right after starting it, so a warp either multiplies or exponentiates. Here, in Gluon, a
program says when to wait. Rows of keys come in pairs (a, b); what is in flight while which row is exponentiated:

    start s_b              | exponentials of a
    start acc += p_a v_a, start s_a of the next pair; wait for s_b
                           | exponentials of b
    start acc += p_b v_b; wait for all but that

With EARLY_WAIT s_b is waited for before acc += p_a v_a is started, so that both starts may stand among exponentials.

The softmax is optimistic: a query's scores are taken relative to their maximum in the first image row, once, in place
of a running maximum that every product of values would have to wait for. bfloat16 has the exponents of float32, so a
large p is as exact as a small one. A program with a sum above 2^60 sets its flag, and `relpos_global` computes that
tile again with the running maximum.
"""

# ruff: noqa: N803, N806
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .arguments import head_parts
from .tiles import Tile

wait_for_all = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7 renamed it


@gluon.jit
def _fetch(
    pairs0, pairs1, tiles0, tiles1, ready, pair, token, column,
    D0: gl.constexpr, D1: gl.constexpr, PAIRS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Starts the copy of two image rows of keys or values into their slot of the ring."""
    slot = pair % STAGES
    wanted = (pair >= 0) & (pair < PAIRS)
    bar = ready.index(slot)
    mbarrier.expect(bar, 128 * (D0 + D1) * 2, pred=wanted)
    tma.async_copy_global_to_shared(pairs0, [token + pair * 128, column], bar, tiles0.index(slot), pred=wanted)
    if D1 > 0:
        tma.async_copy_global_to_shared(pairs1, [token + pair * 128, column + D0], bar, tiles1.index(slot), pred=wanted)


@gluon.jit
def _start_scores(
    q0, q1, keys0, keys1, pair,
    ODD: gl.constexpr, SCORES: gl.constexpr, D1: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    slot = pair % STAGES
    zero = gl.zeros([BLOCK_M, 64], gl.float32, SCORES)
    s = warpgroup_mma(q0, keys0.index(slot).slice(ODD * 64, 64).permute((1, 0)), zero, use_acc=False, is_async=True)
    if D1 > 0:
        s = warpgroup_mma(q1, keys1.index(slot).slice(ODD * 64, 64).permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def _start_sum(p, acc0, acc1, values0, values1, pair, ODD: gl.constexpr, D1: gl.constexpr, STAGES: gl.constexpr):
    slot = pair % STAGES
    acc0 = warpgroup_mma(p, values0.index(slot).slice(ODD * 64, 64), acc0, is_async=True)
    if D1 > 0:
        acc1 = warpgroup_mma(p, values1.index(slot).slice(ODD * 64, 64), acc1, is_async=True)
    return acc0, acc1


@gluon.jit
def _row_term(rel_h, column, second, SCORES: gl.constexpr, BLOCK_M: gl.constexpr):
    """[BLOCK_M, 1] terms of one row of keys: the second image row of queries lies one further from it."""
    term = rel_h.index(column).permute((1, 0)).load(SCORES)
    if BLOCK_M == 128:
        term = gl.where(second, rel_h.index(column + 1).permute((1, 0)).load(SCORES), term)
    return term


@gluon.jit
def _weights(s, rel_w, rel_h_row, total, scale_log2, OPERAND: gl.constexpr):
    p = gl.exp2(s * scale_log2 + (rel_w + rel_h_row))
    total += gl.sum(p.reshape([p.shape[0], 8, 8]), 1)
    return gl.convert_layout(p.to(gl.bfloat16), OPERAND), total


@gluon.jit
def hopper_kernel(
    queries0, queries1, pairs0, pairs1, tables_h0, tables_h1, tables_w0, tables_w1, scratch, out, flags,
    scale_log2,
    HEADS: gl.constexpr, GH: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr, HOLD_Q: gl.constexpr,
    EARLY_WAIT: gl.constexpr, SHORT_TABLE: gl.constexpr,
):  # fmt: skip
    D: gl.constexpr = D0 + D1
    E1: gl.constexpr = 16 if D1 == 0 else D1
    WARPS: gl.constexpr = gl.num_warps()
    TOKENS: gl.constexpr = GH * 64
    PAIRS: gl.constexpr = GH // 2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 64, 16])
    TERMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 128, 16])
    ROWS: gl.constexpr = 64 if SHORT_TABLE else 128  # of rel_pos_h; from the tile's own, one image row needs no more
    ROW_TERMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, ROWS, 16])
    SUM0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D0, 16])
    SUM1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, E1, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    WIDE: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    NARROW: gl.constexpr = gl.NVMMASharedLayout(32, 16)
    tile, head, image = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    token = image * TOKENS
    k_column = (HEADS + head) * D
    v_column = (2 * HEADS + head) * D

    q0 = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_M, D0], WIDE)
    keys0 = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 128, D0], WIDE)
    values0 = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 128, D0], WIDE)
    q1 = q0
    keys1 = keys0
    values1 = values0
    if D1 > 0:
        q1 = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_M, D1], NARROW)
        keys1 = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 128, D1], NARROW)
        values1 = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 128, D1], NARROW)
    table_h0 = values0.index(0).slice(0, ROWS)  # until the first values come
    table_w0 = values0.index(1)
    table_h1 = values1.index(0).slice(0, ROWS)
    table_w1 = values1.index(1)
    rel_h = gl.allocate_shared_memory(gl.float32, [ROWS, 1, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(slot), count=1)
        mbarrier.init(v_ready.index(slot), count=1)
    mbarrier.init(q_ready, count=1)
    fence_async_shared()
    wait_for_all()

    first_row = tile if SHORT_TABLE else 0
    mbarrier.expect(q_ready, (BLOCK_M + ROWS + 128) * D * 2)
    tma.async_copy_global_to_shared(queries0, [token + tile * BLOCK_M, head * D], q_ready, q0)
    tma.async_copy_global_to_shared(tables_h0, [first_row, 0], q_ready, table_h0)
    tma.async_copy_global_to_shared(tables_w0, [0, 0], q_ready, table_w0)
    if D1 > 0:
        tma.async_copy_global_to_shared(queries1, [token + tile * BLOCK_M, head * D + D0], q_ready, q1)
        tma.async_copy_global_to_shared(tables_h1, [first_row, D0], q_ready, table_h1)
        tma.async_copy_global_to_shared(tables_w1, [0, D0], q_ready, table_w1)
    for pair in gl.static_range(STAGES):
        _fetch(pairs0, pairs1, keys0, keys1, k_ready, pair, token, k_column, D0, D1, PAIRS, STAGES)
    mbarrier.wait(q_ready, 0)

    program = (image * HEADS + head) * gl.num_programs(0) + tile
    terms = scratch + program.to(gl.int64) * (64 * BLOCK_M)
    i_terms = gl.arange(0, BLOCK_M, gl.SliceLayout(1, TERMS))
    c_terms = gl.arange(0, 128, gl.SliceLayout(0, TERMS))
    zero = gl.zeros([BLOCK_M, 128], gl.float32, TERMS)
    products = warpgroup_mma(q0, table_w0.permute((1, 0)), zero, use_acc=False, is_async=True)
    if D1 > 0:
        products = warpgroup_mma(q1, table_w1.permute((1, 0)), products, is_async=True)
    products = warpgroup_mma_wait(0, [products])
    key = (i_terms % 64)[:, None] + 63 - c_terms[None, :]
    gl.store(terms + i_terms[:, None] * 64 + key, products * 1.4426950408889634, mask=(key >= 0) & (key < 64))
    zero = gl.zeros([BLOCK_M, ROWS], gl.float32, ROW_TERMS)
    products = warpgroup_mma(q0, table_h0.permute((1, 0)), zero, use_acc=False, is_async=True)
    if D1 > 0:
        products = warpgroup_mma(q1, table_h1.permute((1, 0)), products, is_async=True)
    products = warpgroup_mma_wait(0, [products])
    by_query: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0, 1])
    rel_h._reinterpret(gl.float32, [BLOCK_M, ROWS], by_query).store(products * 1.4426950408889634)
    if HOLD_Q:
        q0 = q0.load(OPERAND)
        if D1 > 0:
            q1 = q1.load(OPERAND)
    wait_for_all()
    for pair in gl.static_range(STAGES - 1):  # sums stay in flight, so a slot of values is free one pair later
        _fetch(pairs0, pairs1, values0, values1, v_ready, pair, token, v_column, D0, D1, PAIRS, STAGES)
    i = gl.arange(0, BLOCK_M, gl.SliceLayout(1, SCORES))
    n = gl.arange(0, 64, gl.SliceLayout(0, SCORES))
    rel_w = gl.load(terms + i[:, None] * 64 + n[None, :])
    column = (
        tile * (BLOCK_M // 64) - first_row + GH - 1
    )  # of the table, for the tile's first row of queries and key row 0
    second = (i >= 64)[:, None]

    mbarrier.wait(k_ready.index(0), 0)
    s0 = _start_scores(q0, q1, keys0, keys1, 0, 0, SCORES, D1, BLOCK_M, STAGES)
    s0 = warpgroup_mma_wait(0, [s0])
    rel_w -= gl.max(s0 * scale_log2 + rel_w, 1)[:, None] + _row_term(rel_h, column, second, SCORES, BLOCK_M)
    total = gl.sum(gl.zeros([BLOCK_M, 64], gl.float32, SCORES).reshape([BLOCK_M, 8, 8]), 1)
    acc0 = warpgroup_mma_init(gl.zeros([BLOCK_M, D0], gl.float32, SUM0))
    acc1 = warpgroup_mma_init(gl.zeros([BLOCK_M, E1], gl.float32, SUM1))
    EACH: gl.constexpr = 2 if D1 > 0 else 1
    for pair in range(PAIRS - 1):
        s1 = _start_scores(q0, q1, keys0, keys1, pair, 1, SCORES, D1, BLOCK_M, STAGES)
        h0 = _row_term(rel_h, column - 2 * pair, second, SCORES, BLOCK_M)
        h1 = _row_term(rel_h, column - 2 * pair - 1, second, SCORES, BLOCK_M)
        p0, total = _weights(s0, rel_w, h0, total, scale_log2, OPERAND)
        mbarrier.wait(v_ready.index(pair % STAGES), (pair // STAGES) & 1)
        if EARLY_WAIT:
            mbarrier.wait(k_ready.index((pair + 1) % STAGES), ((pair + 1) // STAGES) & 1)
            s1 = warpgroup_mma_wait(0, [s1])
        acc0, acc1 = _start_sum(p0, acc0, acc1, values0, values1, pair, 0, D1, STAGES)
        if not EARLY_WAIT:
            mbarrier.wait(k_ready.index((pair + 1) % STAGES), ((pair + 1) // STAGES) & 1)
        s2 = _start_scores(q0, q1, keys0, keys1, pair + 1, 0, SCORES, D1, BLOCK_M, STAGES)
        if not EARLY_WAIT:
            s1 = warpgroup_mma_wait(2 * EACH, [s1])
        p1, total = _weights(s1, rel_w, h1, total, scale_log2, OPERAND)
        acc0, acc1 = _start_sum(p1, acc0, acc1, values0, values1, pair, 1, D1, STAGES)
        s0 = warpgroup_mma_wait(EACH, [s2])
        wait_for_all()
        _fetch(pairs0, pairs1, keys0, keys1, k_ready, pair + STAGES, token, k_column, D0, D1, PAIRS, STAGES)
        _fetch(pairs0, pairs1, values0, values1, v_ready, pair + STAGES - 1, token, v_column, D0, D1, PAIRS, STAGES)
    s1 = _start_scores(q0, q1, keys0, keys1, PAIRS - 1, 1, SCORES, D1, BLOCK_M, STAGES)
    h0 = _row_term(rel_h, column - GH + 2, second, SCORES, BLOCK_M)
    h1 = _row_term(rel_h, column - GH + 1, second, SCORES, BLOCK_M)
    p0, total = _weights(s0, rel_w, h0, total, scale_log2, OPERAND)
    mbarrier.wait(v_ready.index((PAIRS - 1) % STAGES), ((PAIRS - 1) // STAGES) & 1)
    acc0, acc1 = _start_sum(p0, acc0, acc1, values0, values1, PAIRS - 1, 0, D1, STAGES)
    s1 = warpgroup_mma_wait(EACH, [s1])
    p1, total = _weights(s1, rel_w, h1, total, scale_log2, OPERAND)
    acc0, acc1 = _start_sum(p1, acc0, acc1, values0, values1, PAIRS - 1, 1, D1, STAGES)

    sums = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, SUM0))
    unsafe = 1 - (sums < 1.152921504606847e18).to(gl.int32)  # 2^60, or NaN; the first image row alone adds 1 or more
    gl.store(flags + program, gl.max(unsafe, 0))
    m = tile * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, SUM0))
    starts = out + (token + m).to(gl.int64)[:, None] * (HEADS * D) + head * D
    if D1 > 0:
        o0, o1 = warpgroup_mma_wait(0, [acc0, acc1])
        m1 = tile * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, SUM1))
        starts1 = out + (token + m1).to(gl.int64)[:, None] * (HEADS * D) + head * D
        sums1 = gl.convert_layout(sums, gl.SliceLayout(1, SUM1))
        gl.store(
            starts1 + D0 + gl.arange(0, E1, gl.SliceLayout(0, SUM1))[None, :], (o1 / sums1[:, None]).to(gl.bfloat16)
        )
    else:
        o0 = warpgroup_mma_wait(0, [acc0])
    gl.store(starts + gl.arange(0, D0, gl.SliceLayout(0, SUM0))[None, :], (o0 / sums[:, None]).to(gl.bfloat16))


def suits_hopper(qkv: torch.Tensor, grid: tuple[int, int], tile: Tile) -> bool:
    """Whether this kernel takes these inputs, a warpgroup for each 64 queries; a short table is for one image row."""
    fits = tile.block_m == 16 * tile.num_warps and not (tile.short_table and tile.block_m > 64)
    return fits and takes(qkv, grid, tile)


def takes(qkv: torch.Tensor, grid: tuple[int, int], tile: Tile) -> bool:
    """Whether inputs are bfloat16, of 64 tokens a row, enough pairs of rows, images in one matrix."""
    gh, gw = grid
    one_matrix = qkv.shape[0] == 1 or qkv.stride(0) == qkv.shape[1] * qkv.stride(1)
    rows_fit = gh % 2 == 0 and 2 * tile.num_stages <= gh <= 64
    plain = qkv.dtype == torch.bfloat16 and gw == 64 and rows_fit and one_matrix
    return plain and not triton.knobs.runtime.interpret


def launch_hopper(
    qkv: torch.Tensor, rel_pos_h: torch.Tensor, rel_pos_w: torch.Tensor, gh: int, scale_log2: float, tile: Tile
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, tokens, heads * d], and [B, heads, query tiles] int32, not 0 where the query tile must be computed again."""
    batch, tokens, _, heads, d = qkv.shape
    d0, d1 = head_parts(d)
    tiles = tokens // tile.block_m
    matrix = qkv.as_strided((batch * tokens, 3 * heads * d), (qkv.stride(1), 1))
    h_rows = 64 if tile.short_table else 128
    sources = [
        describe(values, rows, width)
        for values, rows in ((matrix, tile.block_m), (matrix, 128), (rel_pos_h, h_rows), (rel_pos_w, 128))
        for width in (d0, d1)
    ]
    scratch = qkv.new_empty(batch * heads * tiles, 64 * tile.block_m, dtype=torch.float32)
    out = qkv.new_empty(batch, tokens, heads * d)
    unsafe = qkv.new_empty(batch, heads, tiles, dtype=torch.int32)
    hopper_kernel[(tiles, heads, batch)](
        *sources, scratch, out, unsafe, scale_log2,
        HEADS=heads, GH=gh, D0=d0, D1=d1, BLOCK_M=tile.block_m, STAGES=tile.num_stages, HOLD_Q=tile.hold_q,
        EARLY_WAIT=tile.early_wait, SHORT_TABLE=tile.short_table,
        num_warps=tile.num_warps, maxnreg=tile.max_registers,
    )  # fmt: skip
    return out, unsafe


def describe(values: torch.Tensor, rows: int, width: int) -> TensorDescriptor | None:
    """For [rows, width] of a matrix, swizzled as wide as they are."""
    layout = gl.NVMMASharedLayout(2 * width, 16) if width else None
    return TensorDescriptor.from_tensor(values, [rows, width], layout) if width else None
