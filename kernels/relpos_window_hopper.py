"""`relpos_window` for Hopper, bfloat16, 64 tokens a row: a program stays, copies run ahead of the products.

    copying warp     | for every window: queries, keys and values, as soon as there is room (`window_copies`)
    four warps       | for every block of 8 x 8 queries: its terms (`window_terms`), scores of all keys, weights, output

A block's scores fit in registers: the softmax has one pass. Two programs run on a multiprocessor, one's copies and
exponentials under the other's products.
"""

# ruff: noqa: N803, N806, SIM113
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import math

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .relpos_hopper import describe, takes, wait_for_all
from .tiles import Tile
from .window_copies import ACROSS, BOXES, SIDE, copy_windows, pad_side, side_of, slot_of, window_of
from .window_terms import fill_spreads, turn_terms

LOG2_E = math.log2(math.e)
REGISTERS = 128  # of a thread at first; the warps that multiply take over what the copying one leaves
COPYING_REGISTERS = gl.constexpr(64)


@gluon.jit
def _like(x, y):
    return gl.convert_layout(x, y.type.layout)


@gluon.jit
def _load(q, D1: gl.constexpr, OPERAND: gl.constexpr):
    """A block of queries, and what is left of them beside 64 columns."""
    queries = q[0].load(OPERAND)
    narrow = queries
    if D1 > 0:
        narrow = q[1].load(OPERAND)
    return queries, narrow


@gluon.jit
def _start_terms(queries, narrow, tables, D1: gl.constexpr):
    TERMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    zero = gl.zeros([64, 64], gl.float32, TERMS)
    terms = warpgroup_mma(queries, tables[0].permute((1, 0)), zero, use_acc=False, is_async=True)
    if D1 > 0:
        terms = warpgroup_mma(narrow, tables[1].permute((1, 0)), terms, is_async=True)
    return terms


@gluon.jit
def _start_scores(queries, narrow, terms, keys, narrow_keys, spread, COUNT: gl.constexpr, D1: gl.constexpr):
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COUNT, 16])
    zero = gl.zeros([64, COUNT], gl.float32, LAYOUT)
    s = warpgroup_mma(terms, spread.permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma(queries, keys.permute((1, 0)), s, is_async=True)
    if D1 > 0:
        s = warpgroup_mma(narrow, narrow_keys.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def _highest(s, COUNT: gl.constexpr):
    return gl.max(s.reshape([64, COUNT // 8, 8]), 1)


@gluon.jit
def _weights(s, highest, scale_log2, COUNT: gl.constexpr, OPERAND: gl.constexpr):
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COUNT, 16])
    p = gl.exp2(s * scale_log2 - gl.convert_layout(highest, gl.SliceLayout(1, LAYOUT))[:, None])
    return gl.convert_layout(p.to(gl.bfloat16), OPERAND), gl.sum(p.reshape([64, COUNT // 8, 8]), 1)


@gluon.jit
def _store(
    acc, inverse, out, y, x, rows_left, columns_left, LAYOUT: gl.constexpr, HEADS: gl.constexpr,
    D: gl.constexpr, FIRST: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """Stores columns FIRST... of a block of the output."""
    i = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    columns = FIRST + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    token = (y + i // 8) * 64 + x + i % 8
    real = (i // 8 < rows_left) & (i % 8 < columns_left)
    inverse = gl.convert_layout(inverse, gl.SliceLayout(1, acc.type.layout))
    values = gl.convert_layout((acc * inverse[:, None]).to(out.dtype.element_ty), LAYOUT)
    gl.store(out + token[:, None] * (HEADS * D) + columns[None, :], values, mask=real[:, None])


@gluon.jit
def _start_part(p, values, narrow_values, acc, acc1, use_acc: gl.constexpr, D1: gl.constexpr):
    acc = warpgroup_mma(p, values, acc, use_acc=use_acc, is_async=True)
    if D1 > 0:
        acc1 = warpgroup_mma(p, narrow_values, acc1, use_acc=use_acc, is_async=True)
    return acc, acc1


@gluon.jit
def _start_sum(
    s_a, s_b, s_c, values, value_ready, phase, scale_log2,
    SUM: gl.constexpr, SUM1: gl.constexpr, OPERAND: gl.constexpr, D1: gl.constexpr,
):  # fmt: skip
    """Starts the products of weights and values; also what to multiply them with."""
    v_a, v_b, v_c, v_a1, v_b1, v_c1 = values
    highest = _highest(s_a, 128)
    highest = gl.maximum(highest, _like(_highest(s_b, 64), highest))
    highest = gl.maximum(highest, _like(_highest(s_c, 16), highest))
    highest = gl.max(highest, 1) * scale_log2
    p_a, sums = _weights(s_a, highest, scale_log2, 128, OPERAND)
    acc = gl.zeros([64, 64], gl.float32, SUM)
    acc1 = acc
    if D1 > 0:
        acc1 = gl.zeros([64, D1], gl.float32, SUM1)
    p_b, sums_b = _weights(s_b, highest, scale_log2, 64, OPERAND)
    p_c, sums_c = _weights(s_c, highest, scale_log2, 16, OPERAND)
    mbarrier.wait(value_ready, phase)
    acc, acc1 = _start_part(p_a, v_a, v_a1, acc, acc1, False, D1)
    acc, acc1 = _start_part(p_b, v_b, v_b1, acc, acc1, True, D1)
    acc, acc1 = _start_part(p_c, v_c, v_c1, acc, acc1, True, D1)
    sums += _like(sums_b, sums)
    sums += _like(sums_c, sums)
    return acc, acc1, 1.0 / gl.sum(sums, 1)


@gluon.jit
def _multiply(
    q, parts, spreads, tables, q_ready, ready, done, values_done, qkv_bias, out, scale_log2, inverse_scale, total,
    HEADS: gl.constexpr, GH: gl.constexpr, STAGES: gl.constexpr, D1: gl.constexpr,
):  # fmt: skip
    D: gl.constexpr = 64 + D1
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    SUM1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUM, 2)
    STORED: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 32], [8, 0]],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, 64],
    )
    programs = gl.num_programs(0)
    count = 0  # of blocks
    turn = 0  # of windows
    for task in range(gl.program_id(0), total, programs):
        image, head, y0, x0, down, across = window_of(task, HEADS, GH)
        k_slot, k_phase = slot_of(turn, 0, STAGES)
        v_slot, v_phase = slot_of(turn, 1, STAGES)
        mbarrier.wait(ready.index(k_slot), k_phase)
        right = x0 + SIDE > 64
        bottom = y0 + SIDE > GH
        if right | bottom:
            mbarrier.wait(ready.index(v_slot), v_phase)
            pad_side(parts, k_slot, qkv_bias + (HEADS + head) * D, right, bottom, D1)
            pad_side(parts, v_slot, qkv_bias + (2 * HEADS + head) * D, right, bottom, D1)
            fence_async_shared()
            wait_for_all()
        k_a, k_b, k_c, k_a1, k_b1, k_c1 = side_of(parts, k_slot)
        values = side_of(parts, v_slot)
        blocks = down * across
        for block in range(blocks):
            by = block // across
            bx = block % across
            more = (task + programs < total) | (block + 1 < blocks)
            mbarrier.wait(q_ready, count & 1)
            queries, narrow = _load(q, D1, OPERAND)
            products = _start_terms(queries, narrow, tables, D1)
            products = warpgroup_mma_wait(0, [products])
            terms = turn_terms(products, by, bx, inverse_scale, OPERAND)
            s_a = _start_scores(queries, narrow, terms, k_a, k_a1, spreads[0], 128, D1)
            s_b = _start_scores(queries, narrow, terms, k_b, k_b1, spreads[1], 64, D1)
            s_c = _start_scores(queries, narrow, terms, k_c, k_c1, spreads[2], 16, D1)
            s_a, s_b, s_c = warpgroup_mma_wait(0, [s_a, s_b, s_c])
            # Every warp has its queries, has read the keys and, in a first block, the values of the window before.
            wait_for_all()
            mbarrier.arrive(done, pred=more)
            acc, acc1, inverse = _start_sum(
                s_a, s_b, s_c, values, ready.index(v_slot), v_phase, scale_log2, SUM, SUM1, OPERAND, D1
            )
            if D1 > 0:
                acc, acc1 = warpgroup_mma_wait(0, [acc, acc1])
            else:
                acc = warpgroup_mma_wait(0, [acc])
            starts = out + image.to(gl.int64) * (GH * 64 * HEADS * D) + head * D
            y = y0 + by * 8
            x = x0 + bx * 8
            rows_left = gl.minimum(SIDE - by * 8, GH - y)
            columns_left = gl.minimum(SIDE - bx * 8, 64 - x)
            _store(acc, inverse, starts, y, x, rows_left, columns_left, STORED, HEADS, D, 0, 64)
            if D1 > 0:
                _store(acc1, inverse, starts, y, x, rows_left, columns_left, SUM1, HEADS, D, 64, D1)
            count += 1
        if STAGES == 2:
            wait_for_all()
            mbarrier.arrive(values_done, pred=task + programs < total)
        turn += 1


@gluon.jit(do_not_specialize=["total"])
def hopper_window_kernel(
    b88, b84, b48, b82, b28, b44, b42, b24, tables_h, tables_w,
    n88, n84, n48, n82, n28, n44, n42, n24, narrow_h, narrow_w,
    qkv_bias, out, scale_log2, inverse_scale, total,
    HEADS: gl.constexpr, GH: gl.constexpr, STAGES: gl.constexpr, D1: gl.constexpr,
):  # fmt: skip
    """As many programs as run at a time; `total` is images times windows times heads, heads fastest.

    D1: columns of a head beside 64, 0 or 16; without any, the narrow sources are None.
    """
    WIDE: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    NARROW: gl.constexpr = gl.NVMMASharedLayout(32, 16)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    NARROW_ROWS: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    q0 = gl.allocate_shared_memory(gl.bfloat16, [64, 64], WIDE)
    table0 = gl.allocate_shared_memory(gl.bfloat16, [64, 64], WIDE)  # of rows, then of columns, 27 each and zeros
    a0 = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 128, 64], WIDE)
    b0 = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, 64], WIDE)
    c0 = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 16, 64], WIDE)
    if D1 > 0:
        q1 = gl.allocate_shared_memory(gl.bfloat16, [64, D1], NARROW)
        table1 = gl.allocate_shared_memory(gl.bfloat16, [64, D1], NARROW)
        a1 = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 128, D1], NARROW)
        b1 = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, D1], NARROW)
        c1 = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 16, D1], NARROW)
        boxes = (b88, b84, b48, b82, b28, b44, b42, b24, n88, n84, n48, n82, n28, n44, n42, n24)
        parts = (a0, b0, c0, a1, b1, c1)
        q = (q0, q1)
        tables = (table0, table1)
    else:
        boxes = (b88, b84, b48, b82, b28, b44, b42, b24)  # type: ignore[assignment]
        parts = (a0, b0, c0, a0, b0, c0)
        q = (q0, q0)
        tables = (table0, table0)
    spreads = (
        gl.allocate_shared_memory(gl.bfloat16, [128, 32], gl.NVMMASharedLayout(64, 16)),
        gl.allocate_shared_memory(gl.bfloat16, [64, 32], gl.NVMMASharedLayout(64, 16)),
        gl.allocate_shared_memory(gl.bfloat16, [16, 32], gl.NVMMASharedLayout(64, 16)),
    )
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    tables_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    values_done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
        c0.index(slot).store(gl.zeros([16, 64], gl.bfloat16, ROWS))
        if D1 > 0:
            c1.index(slot).store(gl.zeros([16, D1], gl.bfloat16, NARROW_ROWS))
    mbarrier.init(q_ready, count=1)
    mbarrier.init(tables_ready, count=1)
    mbarrier.init(done, count=1)
    mbarrier.init(values_done, count=1)
    fill_spreads(spreads[0], spreads[1], spreads[2])
    fence_async_shared()
    wait_for_all()
    mbarrier.expect(tables_ready, 64 * (64 + D1) * 2)
    tma.async_copy_global_to_shared(tables_h, [0, 0], tables_ready, table0.slice(0, 32))
    tma.async_copy_global_to_shared(tables_w, [0, 0], tables_ready, table0.slice(32, 32))
    if D1 > 0:
        tma.async_copy_global_to_shared(narrow_h, [0, 64], tables_ready, table1.slice(0, 32))
        tma.async_copy_global_to_shared(narrow_w, [0, 64], tables_ready, table1.slice(32, 32))
    mbarrier.wait(tables_ready, 0)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    q, parts, spreads, tables, q_ready, ready, done, values_done, qkv_bias, out,
                    scale_log2, inverse_scale, total, HEADS, GH, STAGES, D1,
                ),
            ),
            (copy_windows, (boxes, q, parts, q_ready, ready, done, values_done, total, HEADS, GH, STAGES, D1)),
        ],
        [1],
        [COPYING_REGISTERS],
    )  # fmt: skip


def suits_window(qkv: torch.Tensor, grid: tuple[int, int], tile: Tile) -> bool:
    """Whether this kernel takes these inputs: windows with 8 or 14 real rows, slots for both sides."""
    slots_fit = 2 <= tile.num_stages <= (3 if qkv.shape[-1] == 64 else 2)
    fits = (tile.block_m, tile.num_warps) == (64, 4) and slots_fit and grid[0] % SIDE.value in (0, 8)
    return fits and takes(qkv, grid)


def launch_window(
    qkv: torch.Tensor,
    qkv_bias: torch.Tensor,
    rel_pos_h: torch.Tensor,
    rel_pos_w: torch.Tensor,
    out: torch.Tensor,
    gh: int,
    scale: float,
    tile: Tile,
) -> None:
    """Fills `out`, by two programs a multiprocessor."""
    batch, _, _, heads, d = qkv.shape
    step = qkv.stride(1)
    tokens = qkv.as_strided((batch, gh, 64, 3 * heads * d), (qkv.stride(0), 64 * step, step, 1))
    sources: list[TensorDescriptor | None] = []
    for width in (64, d - 64):
        if not width:
            sources += [None] * (len(BOXES) + 2)
            continue
        cube = gl.NVMMASharedLayout(2 * width, 16, rank=4)
        sources += [TensorDescriptor.from_tensor(tokens, [1, rows, columns, width], cube) for rows, columns in BOXES]
        sources += [describe(table, 32, width) for table in (rel_pos_h, rel_pos_w)]
    total = batch * heads * triton.cdiv(gh, SIDE.value) * ACROSS.value
    programs = 2 * torch.cuda.get_device_properties(qkv.device).multi_processor_count
    hopper_window_kernel[(min(total, programs),)](
        *sources, qkv_bias, out, scale * LOG2_E, 1 / scale, total,
        HEADS=heads, GH=gh, STAGES=tile.num_stages, D1=d - 64, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
