"""Attention inside windows of 14 x 14 tokens with decomposed relative positions, without partition, padding or bias.

A window that reaches beyond the grid is filled up, in the reference, with zeros after the LayerNorm. The qkv Linear
turns those into its bias, so padded tokens are real keys: k = b_k, v = b_v. Queries there are dropped afterwards.

    out[m] = sum_n softmax_n(scale q[m].k[n] + rel_h[m, y(n)] + rel_w[m, x(n)]) v[n],   n over the window's 196 tokens
    rel_h[m, y] = q[m].Rh[y(m) - y + 13],   rel_w[m, x] = q[m].Rw[x(m) - x + 13]

One program per (window, head, image) keeps the 196 keys and values in shared memory, as 128 + 64 + 16 (12 of them
masked), and walks the real queries of the window in tiles; a padded key is read from the bias, a padded query is never
computed.

    rel_h = skew(q Rh^T) / scale, rel_w likewise       [BLOCK_M, 14 + 2], a product and a gather along its rows
    s     = q k^T + rel_h Eh + rel_w Ew                Eh[j, n] = 1 where key n lies in row j, Ew in column j
    out   = softmax(scale s) v                         one pass: a row of scores fits in registers

The products with the constants Eh and Ew spread the terms over the scores on the tensor cores: 32 more columns of q
beside its 64 or 80. They round the terms to the dtype of q, as the reference does; the scores stay in float32.

Per image of 64 x 64 tokens (25 windows, 4096 real queries, 196 keys each): 4 * 4096 * 196 heads d FLOPs, against
4 * 4900 * 196 heads d with padded queries. Bytes: qkv read once and out written once, 8 * 4096 heads d in 16-bit floats
(25 MB for ViT-B, 8 us of an H100); the partitioned route also writes and reads the padded x, qkv and out, and a bias of
1.9 MB per head.
"""

# ruff: noqa: ARG001, N803, N806 (a fake takes all arguments; constexpr names are Triton's)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import math

import torch
import triton
import triton.language as tl

from .arguments import check_qkv, check_scale, check_table, has_no_kernel, head_parts
from .quantise_rows import FLOAT8, to_float8
from .relpos_global import global_attention_reference
from .relpos_window_hopper import launch_window, suits_window
from .tiles import Tile, choose_tile

WINDOW = 14
LOG2_E = math.log2(math.e)


def window_attention_reference(
    qkv: torch.Tensor,
    qkv_bias: torch.Tensor,
    rel_pos_h: torch.Tensor,
    rel_pos_w: torch.Tensor,
    grid: tuple[int, int],
    scale: float,
) -> torch.Tensor:
    """The arithmetic of segment_anything's windowed `Block` between the two Linear layers of its attention.

    Args:
        qkv: [B, gh * gw, 3, heads, d], of the real tokens.
        qkv_bias: [3, heads, d]: what the qkv Linear makes of a padded token.
        rel_pos_h: [27, d]; rel_pos_w: [27, d].
        grid: (gh, gw), of any size.
        scale: of the scores, on q.

    Returns:
        [B, gh * gw, heads * d].

    Source: segment_anything/modeling/image_encoder.py, `window_partition`, `Attention.forward`, `window_unpartition`.
    """
    (gh, gw), (batch, _, _, heads, d) = grid, qkv.shape
    down, across = -(-gh // WINDOW), -(-gw // WINDOW)
    padded = qkv_bias.expand(batch, down * WINDOW, across * WINDOW, 3, heads, d).clone()
    padded[:, :gh, :gw] = qkv.view(batch, gh, gw, 3, heads, d)
    windows = padded.view(batch, down, WINDOW, across, WINDOW, 3, heads, d).transpose(2, 3)
    windows = windows.reshape(batch * down * across, WINDOW * WINDOW, 3, heads, d)
    out = global_attention_reference(windows, rel_pos_h, rel_pos_w, (WINDOW, WINDOW), scale)
    out = out.view(batch, down, across, WINDOW, WINDOW, heads * d).transpose(2, 3)
    out = out.reshape(batch, down * WINDOW, across * WINDOW, heads * d)
    return out[:, :gh, :gw].reshape(batch, gh * gw, heads * d)


@triton.jit
def _window_tokens(
    tokens, padding, y0, x0, stride_token,
    FIRST: tl.constexpr, COUNT: tl.constexpr, SIDE: tl.constexpr, GH: tl.constexpr, GW: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """[COUNT, D]: tokens FIRST... of the window at (y0, x0); `padding` [D] beyond the grid, zeros beyond the window."""
    n, d = FIRST + tl.arange(0, COUNT), tl.arange(0, D)
    y, x = y0 + n // SIDE, x0 + n % SIDE
    inside = n < SIDE * SIDE
    real = inside & (y < GH) & (x < GW)
    values = tl.load(tokens + (y * GW + x)[:, None] * stride_token + d[None, :], mask=real[:, None], other=0.0)
    padded = tl.load(padding + d)
    return tl.where((inside & ~real)[:, None], padded[None, :], values)


@triton.jit
def _table_rows(table, SIDE: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """[32, COUNT]: columns FIRST... of a [2 * SIDE - 1, D] table, zeros below."""
    r, d = tl.arange(0, 32)[:, None], FIRST + tl.arange(0, COUNT)[None, :]
    return tl.load(table + r * D + d, mask=r < 2 * SIDE - 1, other=0.0)


@triton.jit
def _skewed_products(q0, q1, t0, t1, coordinate, scale, SIDE: tl.constexpr, D1: tl.constexpr):
    """[queries, 16] in the dtype of q: scale q . table[coordinate - column + SIDE - 1]."""
    products = tl.dot(q0, tl.trans(t0), input_precision="ieee")  # [queries, 32]
    if D1 > 0:
        products = tl.dot(q1, tl.trans(t1), products, input_precision="ieee")
    index = coordinate[:, None] - tl.arange(0, 16)[None, :] + (SIDE - 1)
    index = index & 31  # columns 14 and 15 and queries beyond the window may take any row: nothing uses them
    return tl.gather((products * scale).to(q0.dtype), index, 1)


@triton.jit
def _scores(
    q0, q1, k0, k1, rel_h, rel_w, FIRST: tl.constexpr, COUNT: tl.constexpr, SIDE: tl.constexpr, D1: tl.constexpr
):  # fmt: skip
    """[queries, COUNT] float32: q.k + (rel_h + rel_w) / scale of the window's tokens FIRST..., -inf past them."""
    n, j = FIRST + tl.arange(0, COUNT), tl.arange(0, 16)
    in_row = ((n // SIDE)[None, :] == j[:, None]).to(rel_h.dtype)
    in_column = ((n % SIDE)[None, :] == j[:, None]).to(rel_w.dtype)
    s = tl.dot(q0, tl.trans(k0), input_precision="ieee")
    if D1 > 0:
        s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee")
    s = tl.dot(rel_h, in_row, s, input_precision="ieee")
    s = tl.dot(rel_w, in_column, s, input_precision="ieee")
    if FIRST + COUNT > SIDE * SIDE:
        s = tl.where(n[None, :] < SIDE * SIDE, s, float("-inf"))
    return s


@triton.jit
def _window_kernel(
    qkv, qkv_bias, rel_pos_h, rel_pos_w, out,
    scale_log2, inverse_scale, stride_batch, stride_token,
    HEADS: tl.constexpr, GH: tl.constexpr, GW: tl.constexpr, SIDE: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A program per (head, window, image)."""
    D: tl.constexpr = D0 + D1
    C: tl.constexpr = HEADS * D
    ACROSS: tl.constexpr = (GW + SIDE - 1) // SIDE
    head, window, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    y0, x0 = window // ACROSS * SIDE, window % ACROSS * SIDE
    rows, columns = tl.minimum(SIDE, GH - y0), tl.minimum(SIDE, GW - x0)
    q = qkv + image.to(tl.int64) * stride_batch + head * D
    k, v = q + C, q + 2 * C
    b_k, b_v = qkv_bias + C + head * D, qkv_bias + 2 * C + head * D
    d0, d1 = tl.arange(0, D0), tl.arange(0, 16 if D1 == 0 else D1)

    h0, w0 = _table_rows(rel_pos_h, SIDE, D, 0, D0), _table_rows(rel_pos_w, SIDE, D, 0, D0)
    ka0 = _window_tokens(k, b_k, y0, x0, stride_token, 0, 128, SIDE, GH, GW, D0)
    kb0 = _window_tokens(k, b_k, y0, x0, stride_token, 128, 64, SIDE, GH, GW, D0)
    kc0 = _window_tokens(k, b_k, y0, x0, stride_token, 192, 16, SIDE, GH, GW, D0)
    va0 = _window_tokens(v, b_v, y0, x0, stride_token, 0, 128, SIDE, GH, GW, D0)
    vb0 = _window_tokens(v, b_v, y0, x0, stride_token, 128, 64, SIDE, GH, GW, D0)
    vc0 = _window_tokens(v, b_v, y0, x0, stride_token, 192, 16, SIDE, GH, GW, D0)
    h1, w1, ka1, kb1, kc1, va1, vb1, vc1 = h0, w0, ka0, kb0, kc0, va0, vb0, vc0
    if D1 > 0:
        h1, w1 = _table_rows(rel_pos_h, SIDE, D, D0, D1), _table_rows(rel_pos_w, SIDE, D, D0, D1)
        ka1 = _window_tokens(k + D0, b_k + D0, y0, x0, stride_token, 0, 128, SIDE, GH, GW, D1)
        kb1 = _window_tokens(k + D0, b_k + D0, y0, x0, stride_token, 128, 64, SIDE, GH, GW, D1)
        kc1 = _window_tokens(k + D0, b_k + D0, y0, x0, stride_token, 192, 16, SIDE, GH, GW, D1)
        va1 = _window_tokens(v + D0, b_v + D0, y0, x0, stride_token, 0, 128, SIDE, GH, GW, D1)
        vb1 = _window_tokens(v + D0, b_v + D0, y0, x0, stride_token, 128, 64, SIDE, GH, GW, D1)
        vc1 = _window_tokens(v + D0, b_v + D0, y0, x0, stride_token, 192, 16, SIDE, GH, GW, D1)

    for start in range(0, rows * columns, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        y, x = m // columns, m % columns
        token = (y0 + y) * GW + x0 + x
        real = (m < rows * columns)[:, None]
        q0 = tl.load(q + token[:, None] * stride_token + d0[None, :], mask=real, other=0.0)  # [BLOCK_M, D0]
        q1 = q0
        if D1 > 0:
            q1 = tl.load(q + D0 + token[:, None] * stride_token + d1[None, :], mask=real, other=0.0)
        rel_h = _skewed_products(q0, q1, h0, h1, y, inverse_scale, SIDE, D1)  # [BLOCK_M, 16]
        rel_w = _skewed_products(q0, q1, w0, w1, x, inverse_scale, SIDE, D1)

        sa = _scores(q0, q1, ka0, ka1, rel_h, rel_w, 0, 128, SIDE, D1)
        sb = _scores(q0, q1, kb0, kb1, rel_h, rel_w, 128, 64, SIDE, D1)
        sc = _scores(q0, q1, kc0, kc1, rel_h, rel_w, 192, 16, SIDE, D1)
        highest = tl.maximum(tl.maximum(tl.max(sa, 1), tl.max(sb, 1)), tl.max(sc, 1)) * scale_log2
        pa = tl.exp2(sa * scale_log2 - highest[:, None])
        pb = tl.exp2(sb * scale_log2 - highest[:, None])
        pc = tl.exp2(sc * scale_log2 - highest[:, None])
        inverse = 1.0 / (tl.sum(pa, 1) + tl.sum(pb, 1) + tl.sum(pc, 1))[:, None]
        pa, pb, pc = pa.to(q0.dtype), pb.to(q0.dtype), pc.to(q0.dtype)

        acc = tl.dot(pa, va0, input_precision="ieee")
        acc = tl.dot(pb, vb0, acc, input_precision="ieee")
        acc = tl.dot(pc, vc0, acc, input_precision="ieee")
        outs = out + (image.to(tl.int64) * (GH * GW) + token[:, None]) * C + head * D
        tl.store(outs + d0[None, :], (acc * inverse).to(out.dtype.element_ty), mask=real)
        if D1 > 0:
            acc = tl.dot(pa, va1, input_precision="ieee")
            acc = tl.dot(pb, vb1, acc, input_precision="ieee")
            acc = tl.dot(pc, vc1, acc, input_precision="ieee")
            tl.store(outs + D0 + d1[None, :], (acc * inverse).to(out.dtype.element_ty), mask=real)


def _check(
    qkv: torch.Tensor, qkv_bias: torch.Tensor, rel_pos_h: torch.Tensor, rel_pos_w: torch.Tensor, gh: int, gw: int
) -> None:
    check_qkv(qkv, gh, gw)
    check_table("qkv_bias", qkv_bias, qkv, qkv.shape[2:])
    for name, table in (("rel_pos_h", rel_pos_h), ("rel_pos_w", rel_pos_w)):
        check_table(name, table, qkv, (2 * WINDOW - 1, qkv.shape[-1]))


def launch_window_attention(
    qkv: torch.Tensor,
    qkv_bias: torch.Tensor,
    rel_pos_h: torch.Tensor,
    rel_pos_w: torch.Tensor,
    grid: tuple[int, int],
    scale: float,
    tile: Tile | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`window_attention` with a tile of the caller's choice, and an output in another dtype than qkv's."""
    gh, gw = grid
    _check(qkv, qkv_bias, rel_pos_h, rel_pos_w, gh, gw)
    batch, tokens, _, heads, d = qkv.shape
    check_scale(scale)
    tile = tile or choose_tile("window", qkv)
    d0, d1 = head_parts(d)
    out = qkv.new_empty(batch, tokens, heads * d, dtype=dtype or qkv.dtype)
    if tile.overlap and suits_window(qkv, grid, tile):
        launch_window(qkv, qkv_bias, rel_pos_h, rel_pos_w, out, gh, scale, tile)
        return out
    windows = triton.cdiv(gh, WINDOW) * triton.cdiv(gw, WINDOW)
    _window_kernel[(heads, windows, batch)](
        qkv, qkv_bias, rel_pos_h, rel_pos_w, out,
        scale * LOG2_E, 1 / scale, qkv.stride(0), qkv.stride(1),
        HEADS=heads, GH=gh, GW=gw, SIDE=WINDOW, D0=d0, D1=d1,
        BLOCK_M=tile.block_m, **tile.launch_options(),
    )  # fmt: skip
    return out


@torch.library.custom_op("splitsam::window_attention", mutates_args=())
def window_attention(
    qkv: torch.Tensor,
    qkv_bias: torch.Tensor,
    rel_pos_h: torch.Tensor,
    rel_pos_w: torch.Tensor,
    grid_h: int,
    grid_w: int,
    scale: float,
    float8: bool = False,
) -> torch.Tensor:
    """`window_attention_reference` as one kernel; on a CPU, unless interpreted, that reference itself.

    Args:
        qkv: [B, grid_h * grid_w, 3, heads, d] as the Linear leaves it, any stride over images and tokens; d 64 or 80.
        qkv_bias: [3, heads, d], contiguous.
        rel_pos_h: [27, d], rel_pos_w: [27, d], contiguous, in the dtype of qkv.
        grid_h, grid_w: the grid; need not be a multiple of 14.
        scale: positive, of the scores, on q.
        float8: numbers of e4m3, from -448 to 448, in the place of those of qkv's dtype; on a GPU from sm_89 on.

    Returns:
        [B, grid_h * grid_w, heads * d], contiguous.

    Raises:
        ValueError: for a shape, dtype or stride other than these.
    """
    if has_no_kernel(qkv.device):
        _check(qkv, qkv_bias, rel_pos_h, rel_pos_w, grid_h, grid_w)
        check_scale(scale)
        out = window_attention_reference(qkv, qkv_bias, rel_pos_h, rel_pos_w, (grid_h, grid_w), scale)
        return to_float8(out) if float8 else out
    dtype = FLOAT8 if float8 else qkv.dtype
    return launch_window_attention(qkv, qkv_bias, rel_pos_h, rel_pos_w, (grid_h, grid_w), scale, dtype=dtype)


@window_attention.register_fake
def _(
    qkv: torch.Tensor,
    qkv_bias: torch.Tensor,
    rel_pos_h: torch.Tensor,
    rel_pos_w: torch.Tensor,
    grid_h: int,
    grid_w: int,
    scale: float,
    float8: bool = False,
) -> torch.Tensor:
    dtype = FLOAT8 if float8 else qkv.dtype
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[3] * qkv.shape[4], dtype=dtype)
