"""`relpos_window` for Hopper, bfloat16, 64 tokens a row: a program stays, copies run a window ahead of the products.

A window's 196 keys come in nine boxes, 8 + 4 + 2 rows by 8 + 4 + 2 columns, in an order of their own: parts of 128, 64
and 16 keys, all of this window. The products with the constants Eh and Ew, which spread the terms of `relpos_window`
over the scores, undo that order, and give what is no key a score of -1e30.

    part a    8 x 8 keys, then 8 rows x 4 columns, then 4 rows x 8 columns
    part b    8 x 2, 2 x 8, 4 x 4, 4 x 2, 2 x 4
    part c    2 x 2, in a copy of 2 x 4 as swizzles have 8 rows, so with 4 keys of part b; and 8 rows that stay zero

A block is 8 x 8 queries, of which a thread holds two, at the same column of the window. Its terms leave the tensor
cores as q R^T, for all of both tables, and the skew is a turn of each query's columns among the four threads that
share it: `_skew`, two shuffles for 16 columns, in place of a trip through memory.

Windows at the right and the bottom edge have 8 rows or columns of tokens, so that their padded keys fill whole boxes.
These are overwritten with the bias once they have arrived.

A program goes over windows, heads fastest; one warp copies, four multiply and exponentiate, and two programs share a
multiprocessor, one exponentiating while the other multiplies. Keys and values take turns in a ring of slots. With
three, the next window's keys are copied while this one's are multiplied; with two, as fit for heads of 80, keys after
the last product of keys, and values after the last of values.
"""

# ruff: noqa: N803, N806, RET505, SIM102, SIM113 (a kernel's branches and loops are not Python's)
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

SIDE = gl.constexpr(14)
ACROSS = gl.constexpr(5)  # windows of an image row of 64 tokens
LOG2_E = math.log2(math.e)
COPIED = gl.constexpr(200)  # keys and values of a window, four of them twice
NO_KEY = gl.constexpr(-1e30)
COPYING_REGISTERS = gl.constexpr(64)
COPYING_REGISTERS_EARLY = gl.constexpr(40)
# Rows and columns of a box, in the order of the keys.
BOXES = ((8, 8), (8, 4), (4, 8), (8, 2), (2, 8), (4, 4), (4, 2), (2, 4))

# Of a query's 32 terms in four chunks of 8, those from its shift (0 to 15) on, in two. A register is a pair of terms.
# The first and the second of each pair travel apart, as an odd shift wants them from different threads. Those of both
# chunks go in one register: from which chunks, the sender knows, since the four threads of a query share its shift.
TURN = gl.constexpr("""{
.reg .b32 a, b, c, t, h, e, first, second, x, y;
.reg .pred p;
setp.lt.u32 p, $6, 8;
selp.b32 a, $2, $3, p;
selp.b32 b, $3, $4, p;
selp.b32 c, $4, $5, p;
mov.u32 t, %tid.x;
and.b32 t, t, 3;
and.b32 e, $6, 7;
shr.u32 h, e, 1;
add.u32 e, e, 1;
shr.u32 e, e, 1;
setp.lt.u32 p, t, e;
selp.b32 x, b, a, p;
selp.b32 y, c, b, p;
prmt.b32 first, x, y, 0x5410;
add.u32 x, t, e;
shfl.sync.idx.b32 first, first, x, 0x1c1f, 0xffffffff;
setp.lt.u32 p, t, h;
selp.b32 x, b, a, p;
selp.b32 y, c, b, p;
prmt.b32 second, x, y, 0x7632;
add.u32 x, t, h;
shfl.sync.idx.b32 second, second, x, 0x1c1f, 0xffffffff;
setp.ne.u32 p, h, e;
selp.b32 x, 0x1054, 0x5410, p;
selp.b32 y, 0x3276, 0x7632, p;
prmt.b32 $0, first, second, x;
prmt.b32 $1, first, second, y;
}""")


@gluon.jit
def _like(x, y):
    return gl.convert_layout(x, y.type.layout)


@gluon.jit
def _window_of(task, HEADS: gl.constexpr, GH: gl.constexpr):
    """Image, head, corner, and how many blocks of 8 real rows and columns."""
    WINDOWS: gl.constexpr = (GH + SIDE - 1) // SIDE * ACROSS
    window = task // HEADS % WINDOWS
    y0 = window // ACROSS * SIDE
    x0 = window % ACROSS * SIDE
    down = 1 + (y0 + 8 < GH).to(gl.int32)
    across = 1 + (x0 + 8 < 64).to(gl.int32)
    return task // (HEADS * WINDOWS), task % HEADS, y0, x0, down, across


@gluon.jit
def _fetch_box(
    boxes, index: gl.constexpr, ready, image, y, x, column, side, narrow_side,
    START: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, wanted, D1: gl.constexpr,
):  # fmt: skip
    """Starts the copy of a box of tokens to rows START... of one side of a product."""
    CUBE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
    NARROW_CUBE: gl.constexpr = gl.NVMMASharedLayout(32, 16, rank=4)
    target = side.slice(START, ROWS * COLUMNS)._reinterpret(gl.bfloat16, [1, ROWS, COLUMNS, 64], CUBE)
    tma.async_copy_global_to_shared(boxes[index], [image, y, x, column], ready, target, pred=wanted)
    if D1 > 0:
        target = narrow_side.slice(START, ROWS * COLUMNS)._reinterpret(gl.bfloat16, [1, ROWS, COLUMNS, D1], NARROW_CUBE)
        tma.async_copy_global_to_shared(boxes[8 + index], [image, y, x, column + 64], ready, target, pred=wanted)


@gluon.jit
def _fetch_queries(
    boxes, q, q_ready, task, block, total, HEADS: gl.constexpr, GH: gl.constexpr, D1: gl.constexpr
):  # fmt: skip
    """Starts the copy of a block of queries; returns the next block."""
    image, head, y0, x0, down, across = _window_of(task, HEADS, GH)
    y = y0 + block // across * 8
    x = x0 + block % across * 8
    wanted = task < total
    mbarrier.expect(q_ready, 64 * (64 + D1) * 2, pred=wanted)
    _fetch_box(boxes, 0, q_ready, image, y, x, head * (64 + D1), q[0], q[1], 0, 8, 8, wanted, D1)
    last = (block + 1 == down * across).to(gl.int32)
    return task + last * gl.num_programs(0), (block + 1) * (1 - last)


@gluon.jit
def _side(parts, slot):
    """Parts a, b and c of keys or values, then the narrow ones."""
    return (
        parts[0].index(slot),
        parts[1].index(slot),
        parts[2].index(slot),
        parts[3].index(slot),
        parts[4].index(slot),
        parts[5].index(slot),
    )


@gluon.jit
def _slot(turn, VALUES: gl.constexpr, STAGES: gl.constexpr):
    """The slot and the phase of keys or values of a program's window: they take turns in the ring."""
    if STAGES == 2:
        return VALUES, turn & 1
    else:
        return (2 * turn + VALUES) % STAGES, (2 * turn + VALUES) // STAGES & 1


@gluon.jit
def _fetch_side(
    boxes, parts, ready, turn, VALUES: gl.constexpr, total,
    HEADS: gl.constexpr, GH: gl.constexpr, STAGES: gl.constexpr, D1: gl.constexpr,
):  # fmt: skip
    """Starts the copy of a window's keys or values into their slot of the ring."""
    task = gl.program_id(0) + turn * gl.num_programs(0)
    wanted = task < total
    image, head, y, x, _, _ = _window_of(task, HEADS, GH)
    column = ((1 + VALUES) * HEADS + head) * (64 + D1)
    slot, _ = _slot(turn, VALUES, STAGES)
    bar = ready.index(slot)
    a, b, c, a1, b1, c1 = _side(parts, slot)
    mbarrier.expect(bar, COPIED * (64 + D1) * 2, pred=wanted)
    _fetch_box(boxes, 0, bar, image, y, x, column, a, a1, 0, 8, 8, wanted, D1)
    _fetch_box(boxes, 1, bar, image, y, x + 8, column, a, a1, 64, 8, 4, wanted, D1)
    _fetch_box(boxes, 2, bar, image, y + 8, x, column, a, a1, 96, 4, 8, wanted, D1)
    _fetch_box(boxes, 3, bar, image, y, x + 12, column, b, b1, 0, 8, 2, wanted, D1)
    _fetch_box(boxes, 4, bar, image, y + 12, x, column, b, b1, 16, 2, 8, wanted, D1)
    _fetch_box(boxes, 5, bar, image, y + 8, x + 8, column, b, b1, 32, 4, 4, wanted, D1)
    _fetch_box(boxes, 6, bar, image, y + 8, x + 12, column, b, b1, 48, 4, 2, wanted, D1)
    _fetch_box(boxes, 7, bar, image, y + 12, x + 8, column, b, b1, 56, 2, 4, wanted, D1)
    _fetch_box(boxes, 7, bar, image, y + 12, x + 10, column, c, c1, 0, 2, 4, wanted, D1)


@gluon.jit
def _pad_parts(a, b, c, bias, right, bottom, D: gl.constexpr, ROWS: gl.constexpr):
    """Overwrites keys or values beyond the grid with their bias [D]."""
    values = gl.load(bias + gl.arange(0, D, gl.SliceLayout(0, ROWS)))[None, :]
    padded = gl.zeros([32, D], gl.bfloat16, ROWS) + values
    half = gl.zeros([16, D], gl.bfloat16, ROWS) + values
    if right:
        a.slice(64, 32).store(padded)
        b.slice(0, 16).store(half)
    if bottom:
        a.slice(96, 32).store(padded)
        b.slice(16, 16).store(half)
    b.slice(32, 32).store(padded)
    rows = gl.arange(0, 16, gl.SliceLayout(1, ROWS))[:, None]
    c.store(gl.where(rows < 8, half, 0.0))


@gluon.jit
def _pad_side(parts, slot, bias, right, bottom, D1: gl.constexpr):
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    NARROW_ROWS: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    a, b, c, a1, b1, c1 = _side(parts, slot)
    _pad_parts(a, b, c, bias, right, bottom, 64, ROWS)
    if D1 > 0:
        _pad_parts(a1, b1, c1, bias + 64, right, bottom, D1, NARROW_ROWS)


@gluon.jit
def _place(n, START: gl.constexpr, y: gl.constexpr, x: gl.constexpr, COLUMNS: gl.constexpr, before):
    """Rows and columns of the window where keys from START on lie, in a box; `before` of those until then."""
    m = n - START
    return gl.where(m < 0, before[0], y + m // COLUMNS), gl.where(m < 0, before[1], x + m % COLUMNS)


@gluon.jit
def _store_spread(spread, row, column, j):
    """Eh and Ew of keys at these rows and columns of the window, [keys, 32]: row or column y lies at 13 - y."""
    ones = (row == SIDE - 1 - j) | (column == SIDE - 1 + 16 - j)
    spread.store(ones.to(gl.bfloat16))


@gluon.jit
def _spread(a, b, c):
    """Fills the three parts of [Eh | Ew]."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    j = gl.arange(0, 32, gl.SliceLayout(0, LAYOUT))[None, :]
    n = gl.arange(0, 128, gl.SliceLayout(1, LAYOUT))[:, None]
    place = _place(n, 64, 0, 8, 4, (n // 8, n % 8))
    place = _place(n, 96, 8, 0, 8, place)
    _store_spread(a, place[0], place[1], j)
    n = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))[:, None]
    place = _place(n, 16, 12, 0, 8, (n // 2, 12 + n % 2))
    place = _place(n, 32, 8, 8, 4, place)
    place = _place(n, 48, 8, 12, 2, place)
    place = _place(n, 56, 12, 8, 4, place)
    _store_spread(b, place[0], place[1], j)
    n = gl.arange(0, 16, gl.SliceLayout(1, LAYOUT))[:, None]
    real = (n < 8) & (n % 4 >= 2)
    # What is no key takes column 14 of the terms: -1 as a column of the window, and no row.
    _store_spread(c, gl.where(real, 12 + n // 4, 40), gl.where(real, 10 + n % 4, -1), j)


@gluon.jit
def _skew(chunks, shift):
    """16 of 32 columns from `shift` [64, 1] on, in two chunks [64, 8] of bfloat16."""
    return gl.inline_asm_elementwise(
        TURN,
        "=r,=r,r,r,r,r,r,r",
        [chunks[0], chunks[1], chunks[2], chunks[3], shift],
        [gl.bfloat16, gl.bfloat16],
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _split(terms):
    """[64, 64] in eight chunks of 8 columns."""
    even, odd = terms.reshape([64, 2, 2, 2, 8]).permute([0, 4, 1, 2, 3]).split()
    c0, c2 = even.split()
    c1, c3 = odd.split()
    h0, w0 = c0.split()
    h1, w1 = c1.split()
    h2, w2 = c2.split()
    h3, w3 = c3.split()
    return (h0, h1, h2, h3), (w0, w1, w2, w3)


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
def _terms(products, by, bx, inverse_scale, OPERAND: gl.constexpr):
    """[64, 32] bfloat16: rel_h / scale by 13 - the key's row, then rel_w / scale by 13 - its column."""
    h, w = _split((products * inverse_scale).to(gl.bfloat16))
    CHUNK: gl.constexpr = h[0].type.layout
    i = gl.arange(0, 64, gl.SliceLayout(1, CHUNK))[:, None]
    column = gl.arange(0, 8, gl.SliceLayout(0, CHUNK))[None, :]
    h0, h1 = _skew(h, by * 8 + i // 8)
    w0, w1 = _skew(w, bx * 8 + i % 8)
    w1 = gl.where(column < 6, w1, NO_KEY)
    both = gl.join(gl.join(h0, h1), gl.join(w0, w1))  # [64, 8, 2, 2]: of a column in its chunk, chunk, table
    return gl.convert_layout(both.permute([0, 3, 2, 1]).reshape([64, 32]), OPERAND)


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
    EARLY_SUMS: gl.constexpr, SUM: gl.constexpr, SUM1: gl.constexpr, OPERAND: gl.constexpr, D1: gl.constexpr,
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
    if EARLY_SUMS:
        mbarrier.wait(value_ready, phase)
        acc, acc1 = _start_part(p_a, v_a, v_a1, acc, acc1, False, D1)
    p_b, sums_b = _weights(s_b, highest, scale_log2, 64, OPERAND)
    p_c, sums_c = _weights(s_c, highest, scale_log2, 16, OPERAND)
    if not EARLY_SUMS:
        mbarrier.wait(value_ready, phase)
        acc, acc1 = _start_part(p_a, v_a, v_a1, acc, acc1, False, D1)
    acc, acc1 = _start_part(p_b, v_b, v_b1, acc, acc1, True, D1)
    acc, acc1 = _start_part(p_c, v_c, v_c1, acc, acc1, True, D1)
    sums += _like(sums_b, sums)
    sums += _like(sums_c, sums)
    return acc, acc1, 1.0 / gl.sum(sums, 1)


@gluon.jit
def _copy(
    boxes, q, parts, q_ready, ready, done, values_done, total,
    HEADS: gl.constexpr, GH: gl.constexpr, STAGES: gl.constexpr, D1: gl.constexpr, EARLY_TERMS: gl.constexpr,
):  # fmt: skip
    """What a warp of its own does: all copies, in the order in which `_multiply` gives slots back."""
    ahead, ahead_block = _fetch_queries(boxes, q, q_ready, gl.program_id(0), 0, total, HEADS, GH, D1)
    for item in gl.static_range(STAGES):
        _fetch_side(boxes, parts, ready, item // 2, item % 2, total, HEADS, GH, STAGES, D1)
    count = 0
    if EARLY_TERMS:
        mbarrier.wait(done, 0)
        ahead, ahead_block = _fetch_queries(boxes, q, q_ready, ahead, ahead_block, total, HEADS, GH, D1)
        count = 1
    turn = 0
    for task in range(gl.program_id(0), total, gl.num_programs(0)):
        _, _, _, _, down, across = _window_of(task, HEADS, GH)
        more_windows = task + gl.num_programs(0) < total
        for block in range(down * across):
            more = more_windows | (block + 1 < down * across)
            mbarrier.wait(done, count & 1, pred=more)
            ahead, ahead_block = _fetch_queries(boxes, q, q_ready, ahead, ahead_block, total, HEADS, GH, D1)
            if STAGES > 2:
                if (block == 0) & (turn > 0):
                    _fetch_side(boxes, parts, ready, turn + 1, 0, total, HEADS, GH, STAGES, D1)
            if block + 1 == down * across:
                _fetch_side(boxes, parts, ready, turn + 1, STAGES - 2, total, HEADS, GH, STAGES, D1)
            count += 1
        if STAGES == 2:
            mbarrier.wait(values_done, turn & 1, pred=more_windows)
            _fetch_side(boxes, parts, ready, turn + 1, 1, total, HEADS, GH, STAGES, D1)
        turn += 1


@gluon.jit
def _multiply(
    boxes, q, parts, spreads, tables, q_ready, ready, done, values_done, qkv_bias, out,
    scale_log2, inverse_scale, total,
    HEADS: gl.constexpr, GH: gl.constexpr, STAGES: gl.constexpr, D1: gl.constexpr,
    COPIER: gl.constexpr, EARLY_TERMS: gl.constexpr, EARLY_SUMS: gl.constexpr, WIDE_STORES: gl.constexpr,
):  # fmt: skip
    D: gl.constexpr = 64 + D1
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    SUM1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUM, 2)
    STORED_WIDE: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 32], [8, 0]],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, 64],
    )
    STORED: gl.constexpr = STORED_WIDE if WIDE_STORES else SUM
    first = gl.program_id(0)
    programs = gl.num_programs(0)
    ahead = first
    ahead_block = 0
    if not COPIER:
        ahead, ahead_block = _fetch_queries(boxes, q, q_ready, first, 0, total, HEADS, GH, D1)
        for item in gl.static_range(STAGES):
            _fetch_side(boxes, parts, ready, item // 2, item % 2, total, HEADS, GH, STAGES, D1)
    if EARLY_TERMS:
        mbarrier.wait(q_ready, 0)
        queries, narrow = _load(q, D1, OPERAND)
        products = _start_terms(queries, narrow, tables, D1)
        products = warpgroup_mma_wait(0, [products])
        terms = _terms(products, 0, 0, inverse_scale, OPERAND)
        wait_for_all()
        if COPIER:
            mbarrier.arrive(done)
        else:
            ahead, ahead_block = _fetch_queries(boxes, q, q_ready, ahead, ahead_block, total, HEADS, GH, D1)
    count = 0  # of blocks
    turn = 0  # of windows
    for task in range(first, total, programs):
        image, head, y0, x0, down, across = _window_of(task, HEADS, GH)
        k_slot, k_phase = _slot(turn, 0, STAGES)
        v_slot, v_phase = _slot(turn, 1, STAGES)
        mbarrier.wait(ready.index(k_slot), k_phase)
        right = x0 + SIDE > 64
        bottom = y0 + SIDE > GH
        if right | bottom:
            mbarrier.wait(ready.index(v_slot), v_phase)
            _pad_side(parts, k_slot, qkv_bias + (HEADS + head) * D, right, bottom, D1)
            _pad_side(parts, v_slot, qkv_bias + (2 * HEADS + head) * D, right, bottom, D1)
            fence_async_shared()
            wait_for_all()
        k_a, k_b, k_c, k_a1, k_b1, k_c1 = _side(parts, k_slot)
        values = _side(parts, v_slot)
        blocks = down * across
        for block in range(blocks):
            by = block // across
            bx = block % across
            last = block + 1 == blocks
            more = (task + programs < total) | (block + 1 < blocks)
            if not EARLY_TERMS:
                mbarrier.wait(q_ready, count & 1)
                queries, narrow = _load(q, D1, OPERAND)
                products = _start_terms(queries, narrow, tables, D1)
                products = warpgroup_mma_wait(0, [products])
                terms = _terms(products, by, bx, inverse_scale, OPERAND)
            s_a = _start_scores(queries, narrow, terms, k_a, k_a1, spreads[0], 128, D1)
            s_b = _start_scores(queries, narrow, terms, k_b, k_b1, spreads[1], 64, D1)
            s_c = _start_scores(queries, narrow, terms, k_c, k_c1, spreads[2], 16, D1)
            s_a, s_b, s_c = warpgroup_mma_wait(0, [s_a, s_b, s_c])
            if EARLY_TERMS:
                mbarrier.wait(q_ready, (count + 1) & 1, pred=more)
                queries, narrow = _load(q, D1, OPERAND)
            # Every warp has its queries, has read the keys and, in a first block, the values of the window before.
            wait_for_all()
            if COPIER:
                mbarrier.arrive(done, pred=more)
            else:
                ahead, ahead_block = _fetch_queries(boxes, q, q_ready, ahead, ahead_block, total, HEADS, GH, D1)
                if STAGES > 2:
                    if (block == 0) & (turn > 0):
                        _fetch_side(boxes, parts, ready, turn + 1, 0, total, HEADS, GH, STAGES, D1)
                if last:
                    _fetch_side(boxes, parts, ready, turn + 1, STAGES - 2, total, HEADS, GH, STAGES, D1)

            acc, acc1, inverse = _start_sum(
                s_a, s_b, s_c, values, ready.index(v_slot), v_phase, scale_log2, EARLY_SUMS, SUM, SUM1, OPERAND, D1
            )
            if EARLY_TERMS:
                products = _start_terms(queries, narrow, tables, D1)
            pending: gl.constexpr = (1 + (D1 > 0)) * EARLY_TERMS
            if D1 > 0:
                acc, acc1 = warpgroup_mma_wait(pending, [acc, acc1])
            else:
                acc = warpgroup_mma_wait(pending, [acc])
            starts = out + image.to(gl.int64) * (GH * 64 * HEADS * D) + head * D
            y = y0 + by * 8
            x = x0 + bx * 8
            rows_left = gl.minimum(SIDE - by * 8, GH - y)
            columns_left = gl.minimum(SIDE - bx * 8, 64 - x)
            _store(acc, inverse, starts, y, x, rows_left, columns_left, STORED, HEADS, D, 0, 64)
            if D1 > 0:
                _store(acc1, inverse, starts, y, x, rows_left, columns_left, SUM1, HEADS, D, 64, D1)
            if EARLY_TERMS:
                products = warpgroup_mma_wait(0, [products])
                following = gl.where(last, 0, block + 1)
                terms = _terms(products, following // across, following % across, inverse_scale, OPERAND)
            count += 1
        if STAGES == 2:
            wait_for_all()
            if COPIER:
                mbarrier.arrive(values_done, pred=task + programs < total)
            else:
                _fetch_side(boxes, parts, ready, turn + 1, 1, total, HEADS, GH, STAGES, D1)
        turn += 1


@gluon.jit(do_not_specialize=["total"])
def hopper_window_kernel(
    b88, b84, b48, b82, b28, b44, b42, b24, tables_h, tables_w,
    n88, n84, n48, n82, n28, n44, n42, n24, narrow_h, narrow_w,
    qkv_bias, out, scale_log2, inverse_scale, total,
    HEADS: gl.constexpr, GH: gl.constexpr, STAGES: gl.constexpr, D1: gl.constexpr,
    COPIER: gl.constexpr, EARLY_TERMS: gl.constexpr, EARLY_SUMS: gl.constexpr, WIDE_STORES: gl.constexpr,
):  # fmt: skip
    """As many programs, of one warpgroup, as run at a time; `total` is images times windows times heads, heads fastest.

    D1: columns of a head beside 64, 0 or 16; without any, the narrow sources are None. COPIER: a warp of its own
    copies. EARLY_TERMS: terms of the next block are computed right after this one's sums. EARLY_SUMS: the weights of
    part a are multiplied while those of b and c are exponentiated. WIDE_STORES: 16 bytes a thread.
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
    _spread(spreads[0], spreads[1], spreads[2])
    fence_async_shared()
    wait_for_all()
    mbarrier.expect(tables_ready, 64 * (64 + D1) * 2)
    tma.async_copy_global_to_shared(tables_h, [0, 0], tables_ready, table0.slice(0, 32))
    tma.async_copy_global_to_shared(tables_w, [0, 0], tables_ready, table0.slice(32, 32))
    if D1 > 0:
        tma.async_copy_global_to_shared(narrow_h, [0, 64], tables_ready, table1.slice(0, 32))
        tma.async_copy_global_to_shared(narrow_w, [0, 64], tables_ready, table1.slice(32, 32))
    mbarrier.wait(tables_ready, 0)
    if COPIER:
        gl.warp_specialize(
            [
                (
                    _multiply,
                    (
                        boxes, q, parts, spreads, tables, q_ready, ready, done, values_done, qkv_bias, out,
                        scale_log2, inverse_scale, total,
                        HEADS, GH, STAGES, D1, COPIER, EARLY_TERMS, EARLY_SUMS, WIDE_STORES,
                    ),
                ),
                (
                    _copy,
                    (
                        boxes, q, parts, q_ready, ready, done, values_done, total,
                        HEADS, GH, STAGES, D1, EARLY_TERMS,
                    ),
                ),
            ],
            [1],
            [COPYING_REGISTERS_EARLY if EARLY_TERMS else COPYING_REGISTERS],
        )  # fmt: skip
    else:
        _multiply(
            boxes, q, parts, spreads, tables, q_ready, ready, done, values_done, qkv_bias, out,
            scale_log2, inverse_scale, total,
            HEADS, GH, STAGES, D1, COPIER, EARLY_TERMS, EARLY_SUMS, WIDE_STORES,
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
    variant: tuple[bool, bool, bool, bool] = (True, False, False, True),
) -> None:
    """Fills `out`, by two programs a multiprocessor. `variant`: what `hopper_window_kernel` has choices for."""
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
    copier, early_terms, early_sums, wide_stores = variant
    hopper_window_kernel[(min(total, programs),)](
        *sources, qkv_bias, out, scale * LOG2_E, 1 / scale, total,
        HEADS=heads, GH=gh, STAGES=tile.num_stages, D1=d - 64,
        COPIER=copier, EARLY_TERMS=early_terms, EARLY_SUMS=early_sums, WIDE_STORES=wide_stores,
        num_warps=4, maxnreg=128 if copier else tile.max_registers,
    )  # fmt: skip
