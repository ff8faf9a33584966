"""Terms of `relpos_window_hopper`, and the constants that spread them over the scores.

The products with the constants Eh and Ew, which spread the terms of `relpos_window` over the scores, undo the order in
which `window_copies` brings a window's keys, and give what is no key a score of -1e30.

A block is 8 x 8 queries, of which a thread holds two, at the same column of the window. Its terms leave the tensor
cores as q R^T, for all of both tables, and the skew is a turn of each query's columns among the four threads that
share it: `_skew`, two shuffles for 16 columns, in place of a trip through memory.
"""

# ruff: noqa: N803, N806
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .window_copies import SIDE

NO_KEY = gl.constexpr(-1e30)

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
def fill_spreads(a, b, c):
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
def turn_terms(products, by, bx, inverse_scale, OPERAND: gl.constexpr):
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
