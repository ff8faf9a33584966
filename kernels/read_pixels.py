"""What the decoder's tokens read from the pixels that their prompt sees.

    out[r] = sum_n softmax_n(q[r] . (k[n] + pos[n])) v[n]           r: a head of a token, n over N pixels

R rows of D channels on N pixels. Either k and v are columns of D = 128 in rows at an address, shared by the prompts of
an image; or both are the pixel itself, D = 256, with its position added to k, and each prompt has its own. Then a
pixel's projections have been moved to the rows: 8 x T rows of 256 channels for T tokens in place of two 256 x 128
products for every pixel.

A program per (64 rows, share of the pixels, prompt) goes over its pixels once with a running maximum; a second kernel
joins the shares. One click has as many shares as it takes to fill the GPU, a large batch one.

Per prompt at D = 256, R = 64, N = 4096: 4 R N D = 0.27 GFLOP; 2 MiB of pixels in 16 bits against 1 MiB each of keys
and values written and read by the projections that this replaces.
"""

# ruff: noqa: ARG001, N803 (a fake takes all arguments; constexpr names are Triton's)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from .arguments import has_no_kernel
from .pixel_sources import PIXEL_TILES, check_rows, check_sources, prompt_base, view_sources

BLOCK_ROWS = 64
# About two programs for each multiprocessor of a large GPU, and no share below two tiles.
ENOUGH_PROGRAMS, MOST_SHARES = 264, 32


def read_pixels_reference(
    rows: torch.Tensor,
    sources: torch.Tensor,
    positions: torch.Tensor | None,
    key_column: int,
    value_column: int,
    pixels: int,
    width: int,
) -> torch.Tensor:
    """The same in PyTorch; see `read_pixels`."""
    channels = rows.shape[2]
    found = view_sources(sources, rows, pixels, width)
    keys = found[..., key_column : key_column + channels]
    values = found[..., value_column : value_column + channels]
    if positions is not None:
        keys = keys + positions
    weights = (rows @ keys.mT).float().softmax(-1).to(rows.dtype)
    return weights @ values


@triton.jit
def _read_kernel(
    rows, sources, positions, partial, maxima, sums, out,
    stride_prompt,
    KEY: tl.constexpr, VALUE: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    ADDRESSED: tl.constexpr, LOCATED: tl.constexpr, SHARES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program per (block of rows, share, prompt)."""
    block, share, prompt = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    base = prompt_base(sources, prompt, stride_prompt, rows, ADDRESSED)
    r, d, n = block * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, D), tl.arange(0, BLOCK_N)
    q = tl.load(rows + (prompt * R + r)[:, None] * D + d[None, :])  # [BLOCK_R, D]
    maximum = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, D], tl.float32)
    for start in range(share * (N // SHARES), (share + 1) * (N // SHARES), BLOCK_N):
        pixel = (start + n)[:, None]
        v = tl.load(base + VALUE + pixel * WIDTH + d[None, :])  # [BLOCK_N, D]
        if LOCATED:
            k = (v + tl.load(positions + pixel * D + d[None, :])).to(v.dtype)
        else:
            k = tl.load(base + KEY + pixel * WIDTH + d[None, :])
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * 1.4426950408889634
        highest = tl.maximum(maximum, tl.max(s, 1))
        correction = tl.exp2(maximum - highest)
        p = tl.exp2(s - highest[:, None])
        total = total * correction + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None], input_precision="ieee")
        maximum = highest
    if SHARES == 1:
        result = (acc / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + (prompt * R + r)[:, None] * D + d[None, :], result)
    else:
        place = (prompt * SHARES + share) * R + r
        tl.store(partial + place[:, None].to(tl.int64) * D + d[None, :], acc)
        tl.store(maxima + place, maximum)
        tl.store(sums + place, total)


@triton.jit
def _join_kernel(
    partial, maxima, sums, out,
    R: tl.constexpr, D: tl.constexpr, SHARES: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A program per (block of rows, prompt)."""
    block, prompt = tl.program_id(0), tl.program_id(1)
    r, d, share = block * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, D), tl.arange(0, SHARES)
    places = (prompt * SHARES + share)[:, None] * R + r[None, :]  # [SHARES, BLOCK_R]
    maximum = tl.load(maxima + places)
    weights = tl.exp2(maximum - tl.max(maximum, 0)[None, :])
    total = tl.sum(weights * tl.load(sums + places), 0)
    highest = tl.max(maximum, 0)
    acc = tl.zeros([BLOCK_R, D], tl.float32)
    for i in range(SHARES):
        place = (prompt * SHARES + i) * R + r
        weight = tl.exp2(tl.load(maxima + place) - highest)
        acc += weight[:, None] * tl.load(partial + place[:, None].to(tl.int64) * D + d[None, :])
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + (prompt * R + r)[:, None] * D + d[None, :], result)


def choose_shares(prompts: int, rows: int, pixels: int) -> int:
    """A power of two that leaves each share at least 128 pixels."""
    wanted = min(ENOUGH_PROGRAMS // (prompts * (rows // BLOCK_ROWS)), pixels // 128, MOST_SHARES)
    return 1 << max(0, wanted.bit_length() - 1)


def launch_read_pixels(
    rows: torch.Tensor,
    sources: torch.Tensor,
    positions: torch.Tensor | None,
    key_column: int,
    value_column: int,
    pixels: int,
    width: int,
    shares: int,
) -> torch.Tensor:
    """`read_pixels` with a number of shares of the caller's choice."""
    prompts, count, channels = rows.shape
    out = torch.empty_like(rows)
    parts = shares if shares > 1 else 0
    partial = rows.new_empty(prompts * parts * count * channels, dtype=torch.float32)
    maxima, sums = rows.new_empty(2, prompts * parts * count, dtype=torch.float32)
    block, warps = (32, 4) if positions is not None else (64, 8)
    # One stage: with two, Triton 3.6 and 3.7 fetch the next v, which k is made of too, over the one still being read.
    _read_kernel[(count // BLOCK_ROWS, shares, prompts)](
        rows, sources, positions, partial, maxima, sums, out, pixels * width,
        KEY=key_column, VALUE=value_column, WIDTH=width, N=pixels, R=count, D=channels,
        ADDRESSED=sources.dtype == torch.int64, LOCATED=positions is not None, SHARES=shares,
        BLOCK_R=BLOCK_ROWS, BLOCK_N=min(block, PIXEL_TILES[rows.dtype]), num_warps=warps, num_stages=1,
    )  # fmt: skip
    if shares > 1:
        _join_kernel[(count // 4, prompts)](
            partial, maxima, sums, out, R=count, D=channels, SHARES=shares, BLOCK_R=4, num_warps=4
        )
    return out


@torch.library.custom_op("splitsam::read_pixels", mutates_args=())
def read_pixels(
    rows: torch.Tensor,
    sources: torch.Tensor,
    positions: torch.Tensor | None,
    key_column: int,
    value_column: int,
    pixels: int,
    width: int,
) -> torch.Tensor:
    """Attention from rows to pixels; on a CPU, unless interpreted, in PyTorch.

    Args:
        rows: [P, R, D], contiguous, R of 64 or 128, D of 128 or 256; the scale of the scores multiplied in.
        sources: [P] int64, the addresses of [pixels, width] contiguous values of the dtype of rows, at multiples of 16
            bytes; or those values themselves, [P, pixels, width].
        positions: [pixels, D] to add to the keys, which are the values then; or None.
        key_column, value_column: where keys and values begin in a row of the sources.
        pixels: a power of two from 128 on.

    Returns:
        [P, R, D].

    Raises:
        ValueError: for a shape, dtype or stride other than these.
    """
    check_rows("rows", rows, 256 if positions is not None else rows.shape[-1])
    check_sources(sources, rows)
    if (
        rows.shape[2] not in (128, 256)
        or pixels.bit_count() != 1
        or pixels < 128
        or max(key_column, value_column) + rows.shape[2] > width
    ):
        raise ValueError(f"{pixels} pixels of {width} columns do not fit rows of {rows.shape[2]}")
    if positions is not None and (positions.shape != (pixels, 256) or key_column != value_column):
        raise ValueError(
            f"positions must be [{pixels}, 256] beside keys that are the values, not {list(positions.shape)}"
        )
    if has_no_kernel(rows.device):
        return read_pixels_reference(rows, sources, positions, key_column, value_column, pixels, width)
    shares = choose_shares(len(rows), rows.shape[1], pixels)
    return launch_read_pixels(rows, sources, positions, key_column, value_column, pixels, width, shares)


@read_pixels.register_fake
def _(
    rows: torch.Tensor,
    sources: torch.Tensor,
    positions: torch.Tensor | None,
    key_column: int,
    value_column: int,
    pixels: int,
    width: int,
) -> torch.Tensor:
    return torch.empty_like(rows)
