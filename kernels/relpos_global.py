"""Attention over a whole grid of tokens with decomposed relative positions, in one kernel, without a dense bias.

    out[m] = sum_n softmax_n(scale q[m].k[n] + q[m].Rh[y(m) - y(n) + gh - 1] + q[m].Rw[x(m) - x(n) + gw - 1]) v[n]

A tile of keys is one image row. Within it the row term is one number per query, and the column term is the same
[queries, gw] block for every tile, so it stays in registers and costs one fused multiply-add per score:

    rel_w = skew(q Rw^T)                 once per query tile, [BLOCK_M, gw] float32, in registers
    rel_h = skew(q Rh^T)                 once per query tile, [gh, BLOCK_M] float32, in scratch (L2)
    for each image row y:
        s = scale q k[y]^T + rel_w       one matrix product
        m' = max(m, max(s) + rel_h[y])
        p = exp2(s - (m' - rel_h[y]))    the row term costs nothing per score
        acc = acc exp2(m - m') + p v[y]

A product with the whole table holds every term, each query's shifted by its own position. The shift is made by storing
the product to skewed addresses of a scratch that belongs to the program and reading it back after a barrier: rel_w at
once, into the layout of the scores (a gather across registers takes three times the instructions), rel_h row by row
inside the loop, since registers cannot be indexed by a loop counter.

Per image with N = gh gw tokens: 4 N^2 heads d FLOPs plus 8 N (gh + gw) heads d for the position terms (3 % at 64 x 64).
Bytes: qkv read once (K and V again per query tile, from L2), out written once, 4 N gh heads of scratch; a dense bias
would add 2 N^2 heads (403 MB for ViT-B in bfloat16), to be written, read and kept.
A head of 80 is computed as 64 + 16, not padded to 128. Products accumulate in float32; the softmax is float32.
"""

# ruff: noqa: ARG001, N803, N806 (a fake takes all arguments; constexpr names are Triton's)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .arguments import check_qkv, check_scale, check_table, has_no_kernel, head_parts
from .quantise_rows import FLOAT8, to_float8
from .relpos_hopper_64 import launch_64, suits_64
from .relpos_hopper_80 import launch_80, suits_80
from .tiles import Tile, choose_tile

LOG2_E = math.log2(math.e)
MAX_GRID_SIDE = 128


def global_attention_reference(
    qkv: torch.Tensor, rel_pos_h: torch.Tensor, rel_pos_w: torch.Tensor, grid: tuple[int, int], scale: float
) -> torch.Tensor:
    """The arithmetic of segment_anything's `Attention` between its two Linear layers, in the dtype of `qkv`.

    Args:
        qkv: [B, gh * gw, 3, heads, d].
        rel_pos_h: [2 * gh - 1, d]; rel_pos_w: [2 * gw - 1, d].
        grid: (gh, gw).
        scale: of the scores, on q.

    Returns:
        [B, gh * gw, heads * d].

    Source: segment_anything/modeling/image_encoder.py, `Attention.forward` and `add_decomposed_rel_pos`.
    """
    (gh, gw), (batch, tokens, _, heads, d) = grid, qkv.shape
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = ((q * scale) @ k.transpose(-2, -1)).view(batch, heads, gh, gw, gh, gw)
    q = q.reshape(batch, heads, gh, gw, d)
    rel_h = torch.einsum("bnhwc,hkc->bnhwk", q, rel_pos_h[_offsets(gh, qkv.device)])
    rel_w = torch.einsum("bnhwc,wkc->bnhwk", q, rel_pos_w[_offsets(gw, qkv.device)])
    scores = scores + rel_h[..., :, None] + rel_w[..., None, :]
    weights = scores.view(batch, heads, tokens, tokens).softmax(dim=-1)
    out: torch.Tensor = (weights @ v).transpose(1, 2).reshape(batch, tokens, heads * d)
    return out


def _offsets(side: int, device: torch.device) -> torch.Tensor:
    """[side, side] rows of the table: query - key + side - 1."""
    positions = torch.arange(side, device=device)
    return positions[:, None] - positions[None, :] + side - 1


@triton.jit
def _store_position_terms(
    target, q0, q1, table, coordinate, stride_query, stride_key,
    SIDE: tl.constexpr, TABLE_ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """target[i, j] = log2(e) q[i] . table[coordinate[i] - j + SIDE - 1] for 0 <= j < SIDE; the stores do the skew."""
    rows = tl.arange(0, TABLE_ROWS)
    inside = rows[:, None] < 2 * SIDE - 1
    row_starts = table + rows[:, None] * (D0 + D1)
    t0 = tl.load(row_starts + tl.arange(0, D0)[None, :], mask=inside, other=0.0)  # [TABLE_ROWS, D0]
    products = tl.dot(q0, tl.trans(t0), input_precision="ieee")
    if D1 > 0:
        t1 = tl.load(row_starts + D0 + tl.arange(0, D1)[None, :], mask=inside, other=0.0)  # [TABLE_ROWS, D1]
        products = tl.dot(q1, tl.trans(t1), products, input_precision="ieee")
    keys = coordinate[:, None] + (SIDE - 1) - rows[None, :]
    offsets = tl.arange(0, BLOCK_M)[:, None] * stride_query + keys * stride_key
    tl.store(target + offsets, products * 1.4426950408889634, mask=(keys >= 0) & (keys < SIDE))


@triton.jit
def _global_kernel(
    qkv, pairs0, pairs1, rel_pos_h, rel_pos_w, scratch, out, wanted,
    scale_log2, stride_batch, stride_token,
    HEADS: tl.constexpr, GH: tl.constexpr, GW: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    TABLE_H: tl.constexpr, TABLE_W: tl.constexpr, SCRATCH_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A program per (query tile, head, image); with `wanted`, only those it names."""
    D: tl.constexpr = D0 + D1
    TOKENS: tl.constexpr = GH * GW
    tile, head, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    program = (image * HEADS + head) * tl.num_programs(0) + tile
    if wanted is not None:  # noqa: SIM102 known when compiled; what follows is not
        if tl.load(wanted + program) == 0:
            return
    first = qkv + image.to(tl.int64) * stride_batch + head * D
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d0, d1 = tl.arange(0, D0), tl.arange(0, 16 if D1 == 0 else D1)
    n = tl.arange(0, BLOCK_N)
    real_m = m[:, None] < TOKENS
    real_n = n[:, None] < GW

    q_starts = first + m[:, None] * stride_token
    q0 = tl.load(q_starts + d0[None, :], mask=real_m, other=0.0)  # [BLOCK_M, D0]
    q1 = q0
    if D1 > 0:
        q1 = tl.load(q_starts + D0 + d1[None, :], mask=real_m, other=0.0)  # [BLOCK_M, D1]

    terms = scratch + program.to(tl.int64) * (SCRATCH_COLUMNS * BLOCK_M)
    i = tl.arange(0, BLOCK_M)
    position = m
    if TOKENS % BLOCK_M > 0:
        position = tl.minimum(m, TOKENS - 1)  # so that every term of the last tile is written
    _store_position_terms(terms, q0, q1, rel_pos_w, position % GW, BLOCK_N, 1, GW, TABLE_W, D0, D1, BLOCK_M)
    tl.debug_barrier()  # a thread reads what others of this program wrote, here and in the loop
    rel_w = tl.load(terms + i[:, None] * BLOCK_N + n[None, :], mask=n[None, :] < GW, other=float("-inf"))
    tl.debug_barrier()  # the same scratch now takes the row terms, transposed
    _store_position_terms(terms, q0, q1, rel_pos_h, position // GW, 1, BLOCK_M, GH, TABLE_H, D0, D1, BLOCK_M)
    tl.debug_barrier()

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, 16 if D1 == 0 else D1], tl.float32)
    k_starts = first + HEADS * D + n[:, None] * stride_token
    for row in range(GH):
        if TMA:
            k0 = pairs0.load([image * TOKENS + row * GW, (HEADS + head) * D])  # [BLOCK_N, D0]
        else:
            k0 = tl.load(k_starts + d0[None, :], mask=real_n, other=0.0)
        s = tl.dot(q0, tl.trans(k0), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if D1 > 0:
            if TMA:
                k1 = pairs1.load([image * TOKENS + row * GW, (HEADS + head) * D + D0])  # [BLOCK_N, D1]
            else:
                k1 = tl.load(k_starts + D0 + d1[None, :], mask=real_n, other=0.0)
            s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee")
        s = s * scale_log2 + rel_w
        rel_h_row = tl.load(terms + row * BLOCK_M + i)
        higher = tl.maximum(highest, tl.max(s, 1) + rel_h_row)
        p = tl.exp2(s - (higher - rel_h_row)[:, None])
        shrink = tl.exp2(highest - higher)
        highest = higher
        total = total * shrink + tl.sum(p, 1)
        if TMA:
            v0 = pairs0.load([image * TOKENS + row * GW, (2 * HEADS + head) * D])
        else:
            v0 = tl.load(k_starts + HEADS * D + d0[None, :], mask=real_n, other=0.0)
        p = p.to(v0.dtype)
        acc0 = tl.dot(p, v0, acc0 * shrink[:, None], input_precision="ieee")
        if D1 > 0:
            if TMA:
                v1 = pairs1.load([image * TOKENS + row * GW, (2 * HEADS + head) * D + D0])
            else:
                v1 = tl.load(k_starts + HEADS * D + D0 + d1[None, :], mask=real_n, other=0.0)
            acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision="ieee")
        k_starts += GW * stride_token

    inverse = 1.0 / total[:, None]
    out_starts = out + (image.to(tl.int64) * TOKENS + m[:, None]) * (HEADS * D) + head * D
    tl.store(out_starts + d0[None, :], (acc0 * inverse).to(out.dtype.element_ty), mask=real_m)
    if D1 > 0:
        tl.store(out_starts + D0 + d1[None, :], (acc1 * inverse).to(out.dtype.element_ty), mask=real_m)


def _check(qkv: torch.Tensor, rel_pos_h: torch.Tensor, rel_pos_w: torch.Tensor, gh: int, gw: int) -> None:
    check_qkv(qkv, gh, gw)
    if max(gh, gw) > MAX_GRID_SIDE:
        raise ValueError(f"a grid of {gh} x {gw} is larger than {MAX_GRID_SIDE} a side")
    check_table("rel_pos_h", rel_pos_h, qkv, (2 * gh - 1, qkv.shape[-1]))
    check_table("rel_pos_w", rel_pos_w, qkv, (2 * gw - 1, qkv.shape[-1]))


def _descriptors(
    qkv: torch.Tensor, block_n: int, parts: tuple[int, int]
) -> tuple[TensorDescriptor, TensorDescriptor | None]:
    """Of qkv as a matrix of tokens by 3 * heads * d, for tiles of a row of keys by each part of a head."""
    rows = qkv.shape[0] * qkv.shape[1]
    columns = qkv.shape[2] * qkv.shape[3] * qkv.shape[4]
    matrix = qkv.as_strided((rows, columns), (qkv.stride(1), 1))
    whole = TensorDescriptor.from_tensor(matrix, [block_n, parts[0]])
    return whole, TensorDescriptor.from_tensor(matrix, [block_n, parts[1]]) if parts[1] else None


def _one_matrix(qkv: torch.Tensor) -> bool:
    """Whether the images follow each other at the stride of the tokens, as a descriptor needs."""
    return qkv.shape[0] == 1 or qkv.stride(0) == qkv.shape[1] * qkv.stride(1)


def launch_global_attention(
    qkv: torch.Tensor,
    rel_pos_h: torch.Tensor,
    rel_pos_w: torch.Tensor,
    grid: tuple[int, int],
    scale: float,
    tile: Tile | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`global_attention` with a tile of the caller's choice, and an output in another dtype than qkv's."""
    gh, gw = grid
    _check(qkv, rel_pos_h, rel_pos_w, gh, gw)
    batch, tokens, _, heads, d = qkv.shape
    check_scale(scale)
    tile = tile or choose_tile("global", qkv)
    out = qkv.new_empty(batch, tokens, heads * d, dtype=dtype or qkv.dtype)
    for suits, launch in ((suits_64, launch_64), (suits_80, launch_80)):
        if tile.overlap and suits(qkv, grid, tile):
            unsafe = launch(qkv, rel_pos_h, rel_pos_w, out, gh, scale * LOG2_E, tile)
            exact = Tile(tile.block_m, tile.block_m // 16, 2, tma=True, max_registers=128)
            return _launch(qkv, rel_pos_h, rel_pos_w, grid, scale, exact, out, unsafe)
    return _launch(qkv, rel_pos_h, rel_pos_w, grid, scale, tile, out, None)


def _launch(
    qkv: torch.Tensor,
    rel_pos_h: torch.Tensor,
    rel_pos_w: torch.Tensor,
    grid: tuple[int, int],
    scale: float,
    tile: Tile,
    out: torch.Tensor,
    wanted: torch.Tensor | None,
) -> torch.Tensor:
    """Fills `out`, or of it the query tiles that `wanted`, [B, heads, query tiles] int32, marks."""
    (gh, gw), (batch, tokens, _, heads, d) = grid, qkv.shape
    d0, d1 = head_parts(d)
    block_n = _side_block(gw)
    tiles = triton.cdiv(tokens, tile.block_m)
    scratch_columns = max(gh, block_n)
    scratch = qkv.new_empty(batch * heads * tiles, scratch_columns, tile.block_m, dtype=torch.float32)
    tma = tile.tma and gw == block_n and _one_matrix(qkv)  # a descriptor cannot mask the end of an image row
    pairs0, pairs1 = _descriptors(qkv, block_n, (d0, d1)) if tma else (None, None)
    _global_kernel[(tiles, heads, batch)](
        qkv, pairs0, pairs1, rel_pos_h, rel_pos_w, scratch, out, wanted,
        scale * LOG2_E, qkv.stride(0), qkv.stride(1),
        HEADS=heads, GH=gh, GW=gw, D0=d0, D1=d1,
        TABLE_H=_side_block(2 * gh - 1), TABLE_W=_side_block(2 * gw - 1), SCRATCH_COLUMNS=scratch_columns,
        BLOCK_M=tile.block_m, BLOCK_N=block_n, TMA=tma, **tile.launch_options(),
    )  # fmt: skip
    return out


def _side_block(side: int) -> int:
    """The tile side that holds `side` rows: a power of two, at least the 16 of a matrix instruction."""
    return max(16, 1 << (side - 1).bit_length())


@torch.library.custom_op("splitsam::global_attention", mutates_args=())
def global_attention(
    qkv: torch.Tensor,
    rel_pos_h: torch.Tensor,
    rel_pos_w: torch.Tensor,
    grid_h: int,
    grid_w: int,
    scale: float,
    float8: bool = False,
) -> torch.Tensor:
    """`global_attention_reference` as one kernel; on a CPU, unless interpreted, that reference itself.

    Args:
        qkv: [B, grid_h * grid_w, 3, heads, d] as the Linear leaves it, any stride over images and tokens; d 64 or 80.
        rel_pos_h: [2 * grid_h - 1, d], rel_pos_w: [2 * grid_w - 1, d], contiguous, in the dtype of qkv.
        grid_h, grid_w: the grid, up to 128 a side; fastest where an image row is 16, 32, 64 or 128 tokens.
        scale: positive, of the scores, on q.
        float8: numbers of e4m3, from -448 to 448, in the place of those of qkv's dtype; on a GPU from sm_89 on.

    Returns:
        [B, grid_h * grid_w, heads * d], contiguous.

    Raises:
        ValueError: for a shape, dtype or stride other than these.
    """
    if has_no_kernel(qkv.device):
        _check(qkv, rel_pos_h, rel_pos_w, grid_h, grid_w)
        check_scale(scale)
        out = global_attention_reference(qkv, rel_pos_h, rel_pos_w, (grid_h, grid_w), scale)
        return to_float8(out) if float8 else out
    dtype = FLOAT8 if float8 else qkv.dtype
    return launch_global_attention(qkv, rel_pos_h, rel_pos_w, (grid_h, grid_w), scale, dtype=dtype)


@global_attention.register_fake
def _(
    qkv: torch.Tensor,
    rel_pos_h: torch.Tensor,
    rel_pos_w: torch.Tensor,
    grid_h: int,
    grid_w: int,
    scale: float,
    float8: bool = False,
) -> torch.Tensor:
    dtype = FLOAT8 if float8 else qkv.dtype
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[3] * qkv.shape[4], dtype=dtype)
