"""Copies of `relpos_window_hopper`: windows of 14 x 14 tokens, and their queries, from the grid into shared memory.

A window's 196 keys come in nine boxes, 8 + 4 + 2 rows by 8 + 4 + 2 columns, in an order of their own: parts of 128, 64
and 16 keys, all of this window.

    part a    8 x 8 keys, then 8 rows x 4 columns, then 4 rows x 8 columns
    part b    8 x 2, 2 x 8, 4 x 4, 4 x 2, 2 x 4
    part c    2 x 2, in a copy of 2 x 4 as swizzles have 8 rows, so with 4 keys of part b; and 8 rows that stay zero

Windows at the right and the bottom edge have 8 rows or columns of tokens, so that their padded keys fill whole boxes.
These are overwritten with the bias once they have arrived.

Keys and values of a program's windows take turns in a ring of slots. With three, the next window's keys are copied
while this one's are multiplied; with two, keys after the last product of keys, and values after the last of values.
"""

# ruff: noqa: N803, N806, SIM102, SIM113
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

SIDE = gl.constexpr(14)
ACROSS = gl.constexpr(5)  # windows of an image row of 64 tokens
COPIED = gl.constexpr(200)  # keys and values of a window, four of them twice
# Rows and columns of a box, in the order of the keys.
BOXES = ((8, 8), (8, 4), (4, 8), (8, 2), (2, 8), (4, 4), (4, 2), (2, 4))


@gluon.jit
def window_of(task, HEADS: gl.constexpr, GH: gl.constexpr):
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
    image, head, y0, x0, down, across = window_of(task, HEADS, GH)
    y = y0 + block // across * 8
    x = x0 + block % across * 8
    wanted = task < total
    mbarrier.expect(q_ready, 64 * (64 + D1) * 2, pred=wanted)
    _fetch_box(boxes, 0, q_ready, image, y, x, head * (64 + D1), q[0], q[1], 0, 8, 8, wanted, D1)
    last = (block + 1 == down * across).to(gl.int32)
    return task + last * gl.num_programs(0), (block + 1) * (1 - last)


@gluon.jit
def side_of(parts, slot):
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
def slot_of(turn, VALUES: gl.constexpr, STAGES: gl.constexpr):
    """The slot and the phase of keys or values of a program's window: they take turns in the ring."""
    if STAGES == 2:
        return VALUES, turn & 1
    return (2 * turn + VALUES) % STAGES, (2 * turn + VALUES) // STAGES & 1


@gluon.jit
def _fetch_side(
    boxes, parts, ready, turn, VALUES: gl.constexpr, total,
    HEADS: gl.constexpr, GH: gl.constexpr, STAGES: gl.constexpr, D1: gl.constexpr,
):  # fmt: skip
    """Starts the copy of a window's keys or values into their slot of the ring."""
    task = gl.program_id(0) + turn * gl.num_programs(0)
    wanted = task < total
    image, head, y, x, _, _ = window_of(task, HEADS, GH)
    column = ((1 + VALUES) * HEADS + head) * (64 + D1)
    slot, _ = slot_of(turn, VALUES, STAGES)
    bar = ready.index(slot)
    a, b, c, a1, b1, c1 = side_of(parts, slot)
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
def pad_side(parts, slot, bias, right, bottom, D1: gl.constexpr):
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    NARROW_ROWS: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    a, b, c, a1, b1, c1 = side_of(parts, slot)
    _pad_parts(a, b, c, bias, right, bottom, 64, ROWS)
    if D1 > 0:
        _pad_parts(a1, b1, c1, bias + 64, right, bottom, D1, NARROW_ROWS)


@gluon.jit
def copy_windows(
    boxes, q, parts, q_ready, ready, done, values_done, total,
    HEADS: gl.constexpr, GH: gl.constexpr, STAGES: gl.constexpr, D1: gl.constexpr,
):  # fmt: skip
    """What a warp of its own does: all copies, in the order in which `_multiply` gives slots back."""
    ahead, ahead_block = _fetch_queries(boxes, q, q_ready, gl.program_id(0), 0, total, HEADS, GH, D1)
    for item in gl.static_range(STAGES):
        _fetch_side(boxes, parts, ready, item // 2, item % 2, total, HEADS, GH, STAGES, D1)
    count = 0
    turn = 0
    for task in range(gl.program_id(0), total, gl.num_programs(0)):
        _, _, _, _, down, across = window_of(task, HEADS, GH)
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
