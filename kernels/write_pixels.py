"""What the decoder's tokens write into the pixels that their prompt sees.

    y[n] = LayerNorm(x[n] + sum_h sum_t softmax_t(u[n] . k[h t] + c[h t]) w[h t])

T tokens of 8 heads: R = 8 TP rows of k and w, TP the next of 8 and 16; c is -inf for rows beyond T, which then weigh
nothing. u is the query of a pixel, 128 columns at an address, in the first layer, and x + pos afterwards, with the
projection moved to k; that of what is written is moved to w in both.

A program per (64 pixels, prompt) keeps its R scores a pixel in registers. Per prompt at R = 64 and 4096 pixels:
2 x 4096 x R x (D + 256) = 0.27 GFLOP, 2 MiB read and 2 MiB written in 16 bits; projecting queries and updates instead
takes 0.54 GFLOP and another 4 MiB.
"""

# ruff: noqa: ARG001, N803 (a fake takes all arguments; constexpr names are Triton's)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from .arguments import check_table, has_no_kernel
from .pixel_sources import HEADS, PIXEL_TILES, check_rows, check_sources, prompt_base, view_sources

CHANNELS = 256


def write_pixels_reference(
    rows: torch.Tensor,
    constants: torch.Tensor,
    written: torch.Tensor,
    sources: torch.Tensor,
    positions: torch.Tensor | None,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    query_column: int,
    pixels: int,
    width: int,
) -> torch.Tensor:
    """The same in PyTorch; see `write_pixels`."""
    found = view_sources(sources, rows, pixels, width)
    x, queries = found[..., :CHANNELS], found[..., query_column : query_column + rows.shape[2]]
    if positions is not None:
        queries = queries + positions
    scores = (queries @ rows.mT).float() + constants[:, None]
    weights = scores.view(len(rows), pixels, HEADS, -1).softmax(-1).view_as(scores)
    return F.layer_norm(x + weights.to(rows.dtype) @ written, (CHANNELS,), norm_weight, norm_bias, eps)


@triton.jit
def _write_kernel(
    rows, constants, written, sources, positions, norm_weight, norm_bias, out,
    eps, stride_prompt,
    QUERY: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, R: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    HEAD_COUNT: tl.constexpr, ADDRESSED: tl.constexpr, LOCATED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program per (block of pixels, prompt)."""
    prompt = tl.program_id(1)
    base = prompt_base(sources, prompt, stride_prompt, rows, ADDRESSED)
    pixel = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    r, d, c = tl.arange(0, R), tl.arange(0, D), tl.arange(0, C)
    u = tl.load(base + QUERY + pixel * WIDTH + d[None, :])  # [BLOCK_N, D]
    if LOCATED:
        u = (u + tl.load(positions + pixel * D + d[None, :])).to(u.dtype)
    k = tl.load(rows + (prompt * R + r)[:, None] * D + d[None, :])  # [R, D]
    s = tl.dot(u, tl.trans(k), input_precision="ieee") + tl.load(constants + prompt * R + r)[None, :]
    by_head = tl.reshape(s * 1.4426950408889634, [BLOCK_N, HEAD_COUNT, R // HEAD_COUNT])
    weights = tl.exp2(by_head - tl.max(by_head, 2)[:, :, None])
    weights = tl.reshape(weights / tl.sum(weights, 2)[:, :, None], [BLOCK_N, R])
    w = tl.load(written + (prompt * R + r)[:, None] * C + c[None, :])  # [R, C]
    x = tl.load(base + pixel * WIDTH + c[None, :]).to(tl.float32)
    y = tl.dot(weights.to(w.dtype), w, x, input_precision="ieee")  # [BLOCK_N, C]
    centred = y - (tl.sum(y, 1) / C)[:, None]
    variance = tl.sum(centred * centred, 1) / C
    y = centred * (1.0 / tl.sqrt_rn(variance + eps))[:, None]
    y = y * tl.load(norm_weight + c).to(tl.float32)[None, :] + tl.load(norm_bias + c).to(tl.float32)[None, :]
    outs = out + prompt.to(tl.int64) * (N * C) + pixel * C + c[None, :]
    tl.store(outs, y.to(out.dtype.element_ty))


def choose_warps(device: torch.device) -> int:
    """From Hopper on matrix units read an operand from shared memory; before, registers of four warps are too few."""
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0)
    return 8 if old else 4


@torch.library.custom_op("splitsam::write_pixels", mutates_args=())
def write_pixels(
    rows: torch.Tensor,
    constants: torch.Tensor,
    written: torch.Tensor,
    sources: torch.Tensor,
    positions: torch.Tensor | None,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    query_column: int,
    pixels: int,
    width: int,
) -> torch.Tensor:
    """Attention from pixels to rows, added to the pixels and normalised; on a CPU, unless interpreted, in PyTorch.

    Args:
        rows: [P, R, D], contiguous, R of 64 or 128, head by head; D of 128 or 256; the scale multiplied in.
        constants: [P, R] float32, added to the scores; -inf for rows that do not count.
        written: [P, R, 256].
        sources: as of `read_pixels`, the pixels in their first 256 columns.
        positions: [pixels, 256] to add to the queries, or None.
        norm_weight, norm_bias, eps: of the LayerNorm, [256].
        query_column: where queries begin in a row of the sources.
        pixels: a multiple of 64.

    Returns:
        [P, pixels, 256].

    Raises:
        ValueError: for a shape, dtype or stride other than these.
    """
    check_rows("rows", rows, 256 if positions is not None else rows.shape[-1])
    check_rows("written", written, CHANNELS)
    addressed = check_sources(sources, rows)
    for name, table in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        check_table(name, table, rows, (CHANNELS,))
    if rows.shape[2] not in (128, 256) or pixels % 64 or max(CHANNELS, query_column + rows.shape[2]) > width:
        raise ValueError(f"{pixels} pixels of {width} columns do not fit rows of {rows.shape[2]}")
    if constants.shape != rows.shape[:2] or constants.dtype != torch.float32 or not constants.is_contiguous():
        raise ValueError(f"constants must be contiguous float32 {list(rows.shape[:2])}, not {list(constants.shape)}")
    if written.shape[:2] != rows.shape[:2] or written.dtype != rows.dtype:
        raise ValueError(
            f"written must be {rows.dtype} {list(rows.shape[:2])}, not {written.dtype} {list(written.shape)}"
        )
    if has_no_kernel(rows.device):
        return write_pixels_reference(
            rows, constants, written, sources, positions, norm_weight, norm_bias, eps, query_column, pixels, width
        )
    prompts, count, channels = rows.shape
    out = rows.new_empty(prompts, pixels, CHANNELS)
    block, warps = PIXEL_TILES[rows.dtype], choose_warps(rows.device)
    _write_kernel[(pixels // block, prompts)](
        rows, constants, written, sources, positions, norm_weight, norm_bias, out, eps, pixels * width,
        QUERY=query_column, WIDTH=width, N=pixels, R=count, D=channels, C=CHANNELS, HEAD_COUNT=HEADS,
        ADDRESSED=addressed, LOCATED=positions is not None, BLOCK_N=block, num_warps=warps, num_stages=1,
    )  # fmt: skip
    return out


@write_pixels.register_fake
def _(
    rows: torch.Tensor,
    constants: torch.Tensor,
    written: torch.Tensor,
    sources: torch.Tensor,
    positions: torch.Tensor | None,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    query_column: int,
    pixels: int,
    width: int,
) -> torch.Tensor:
    return rows.new_empty(len(rows), pixels, CHANNELS)
