"""Logits to masks of the upright image and their run boundaries, for masks of any sizes together.

    v[y, x] = sum_i sum_j rows[y].w[i] columns[x].w[j] l[rows[y].start + i, columns[x].start + j]     i, j of 0, 1, 2
    bit[x, y] = v[y, x] > threshold

Both resizings of segment_anything, to the padded input and from its image to the upright one, are linear along each
axis, and neighbouring rows of the padded input touch at most three rows of logits: so they are one product with three
weights an axis, from tables that `axis_taps` makes. Bits are packed column by column, as COCO counts, 32 in a word.

    _cut_kernel    a program per (128 rows x 32 columns, mask): bits; pixels above the threshold, above and below it by
                   the stability offset; the box
    _count_kernel  a program per (columns, mask): boundaries in each column, a pixel that differs from the one before it
    _place_kernel  the same: their positions y + x height, in order, from the running sum of those counts

A mask at 1080p: 2.1 million pixels of 9 products each and 0.26 MB of bits; its boundaries are some 10 kB. A value lies
between the logits that it is made of, so where those are on one side of all thresholds nothing is multiplied.
"""

# ruff: noqa: N803 (constexpr names are Triton's)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

SIDE, FRAME = 256, 1024
WORD, COLUMNS, GROUP = 32, 32, 4
# Of a mask, all int64: addresses of its logits, its tables of rows and columns and its bits, where its columns begin
# among all, height, width, and words in a column; then two float32, the threshold and the stability offset.
PLAN_COLUMNS = 9
# Columns, and words of each, that a program counts at once; a column of 1080 pixels has 34 words.
BLOCK, WORDS = 8, 64
_COLUMN_OPTIONS = {"PLAN": PLAN_COLUMNS, "BLOCK": BLOCK, "WORDS": WORDS, "num_warps": 4}
# Of a mask: area, pixels above the upper and above the lower threshold, what the box follows from, boundaries.
MEASURES = 8
# The most logits that a program's extremes are found of; at 1080p there are 20 x 8.
PATCH_ROWS, PATCH_COLUMNS = 32, 16
# How far rounding may carry a value out of its logits' range, of the largest of them: some ulps.
SLACK = 1e-5


@dataclass(frozen=True, eq=False)
class CutBits:
    """What the kernels leave on the device, of M masks with W columns in all.

    Args:
        measures: [M, 8] int32: area, inner, outer, width - x0, height - y0, x1, y1 of the box, 0 for an empty mask;
            boundaries.
        ends: [W] int32, boundaries up to the end of each column, over all masks.
    """

    measures: torch.Tensor
    ends: torch.Tensor


def axis_taps(kept: int, length: int) -> npt.NDArray[np.float32]:
    """How one axis of the upright image follows from logits: [length, 4] first index and its three weights.

    Args:
        kept: pixels of the 1024 that are the image.
        length: of the upright image, in pixels.

    Source: `Sam.postprocess_masks`, and `upsample_bilinear2d` of PyTorch for its two resizings.
    """

    def resize(index: npt.NDArray[Any], source: int, target: int) -> tuple[npt.NDArray[Any], ...]:
        scale = np.float32(source) / np.float32(target)
        place = np.maximum(scale * (index.astype(np.float32) + np.float32(0.5)) - np.float32(0.5), np.float32(0))
        first = np.minimum(place.astype(np.int64), source - 1)
        return first, np.minimum(first + 1, source - 1), (place - first.astype(np.float32)).astype(np.float64)

    near, far, along = resize(np.arange(length, dtype=np.float32), kept, length)
    taps = np.zeros((length, 4))
    start = np.minimum(resize(near, SIDE, FRAME)[0], SIDE - 3)
    taps[:, 0] = start
    everything = np.arange(length)
    for frame, share in ((near, 1 - along), (far, along)):
        first, second, within = resize(frame, SIDE, FRAME)
        np.add.at(taps, (everything, 1 + first - start), share * (1 - within))
        np.add.at(taps, (everything, 1 + second - start), share * within)
    return taps.astype(np.float32)


@triton.jit
def _count_bits(word):
    """Set bits of uint32 values, as int32."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _cut_kernel(
    plan, measures,
    SIDE: tl.constexpr, WORD: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, PLAN: tl.constexpr,
    MEASURES: tl.constexpr, PATCH_ROWS: tl.constexpr, PATCH_COLUMNS: tl.constexpr, SLACK: tl.constexpr,
):  # fmt: skip
    """A program of one warp per (words and block of columns, mask): a thread has a column, so nobody waits."""
    mask = tl.program_id(1)
    mine = plan + mask * PLAN
    logits = tl.load(mine).to(tl.pointer_type(tl.float32))
    rows = tl.load(mine + 1).to(tl.pointer_type(tl.float32))
    columns = tl.load(mine + 2).to(tl.pointer_type(tl.float32))
    bits = tl.load(mine + 3).to(tl.pointer_type(tl.int32))
    height, width, words = (
        tl.load(mine + 5).to(tl.int32),
        tl.load(mine + 6).to(tl.int32),
        tl.load(mine + 7).to(tl.int32),
    )
    limits = (mine + 8).to(tl.pointer_type(tl.float32))
    threshold, offset = tl.load(limits), tl.load(limits + 1)
    groups = (words + GROUP - 1) // GROUP
    first_word, first_x = (tl.program_id(0) % groups) * GROUP, (tl.program_id(0) // groups) * COLUMNS
    if first_x < width:
        # The extremes of the logits that all of it is made of; of a part of them where they are too many.
        last_x = tl.minimum(first_x + COLUMNS, width) - 1
        last_y = tl.minimum((first_word + GROUP) * WORD, height) - 1
        first_row, last_row = _tap(rows, first_word * WORD), _tap(rows, last_y) + 2
        first_column, last_column = _tap(columns, first_x), _tap(columns, last_x) + 2
        patch_rows = tl.minimum(first_row + tl.arange(0, PATCH_ROWS), last_row)
        patch_columns = tl.minimum(first_column + tl.arange(0, PATCH_COLUMNS), last_column)
        patch = tl.load(logits + patch_rows[:, None] * SIDE + patch_columns[None, :])
        lowest, highest = tl.min(tl.min(patch, 0), 0), tl.max(tl.max(patch, 0), 0)
        slack = SLACK * tl.maximum(tl.abs(lowest), tl.abs(highest))
        fits = (last_row - first_row < PATCH_ROWS) & (last_column - first_column < PATCH_COLUMNS)
        clear = fits & ((lowest - slack > threshold + offset) | (highest + slack < threshold - offset))
        x = first_x + tl.arange(0, COLUMNS)
        in_width = x < width
        left = tl.load(columns + x * 4, mask=in_width, other=0.0).to(tl.int32)
        weight0 = tl.load(columns + x * 4 + 1, mask=in_width, other=0.0)
        weight1 = tl.load(columns + x * 4 + 2, mask=in_width, other=0.0)
        weight2 = tl.load(columns + x * 4 + 3, mask=in_width, other=0.0)
        area, inner, outer = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
        from_bottom, bottom = tl.zeros_like(x), tl.zeros_like(x)
        # What three rows of logits come to in a column; some rows of pixels in turn are made of the same three.
        across0, across1, across2 = tl.zeros_like(weight0), tl.zeros_like(weight0), tl.zeros_like(weight0)
        top = -1
        for word in range(first_word, tl.minimum(first_word + GROUP, words)):
            first_y = word * WORD
            count = tl.minimum(height - first_y, WORD)
            packed = tl.zeros_like(x).to(tl.uint32)
            if clear:
                inside = tl.where(in_width & (lowest > threshold), count, 0)
                packed = tl.where(
                    inside > 0, tl.full([COLUMNS], 0xFFFFFFFF, tl.uint32) >> (WORD - count).to(tl.uint32), 0
                )
                inner += inside
                outer += inside
            else:
                for row in range(count):
                    taps = rows + (first_y + row) * 4
                    here = tl.load(taps).to(tl.int32)
                    if here != top:
                        top = here
                        line = logits + top * SIDE + left
                        across0 = weight0 * tl.load(line) + weight1 * tl.load(line + 1) + weight2 * tl.load(line + 2)
                        line += SIDE
                        across1 = weight0 * tl.load(line) + weight1 * tl.load(line + 1) + weight2 * tl.load(line + 2)
                        line += SIDE
                        across2 = weight0 * tl.load(line) + weight1 * tl.load(line + 1) + weight2 * tl.load(line + 2)
                    value = tl.load(taps + 1) * across0 + tl.load(taps + 2) * across1 + tl.load(taps + 3) * across2
                    packed |= (in_width & (value > threshold)).to(tl.uint32) << row
                    inner += (in_width & (value > threshold + offset)).to(tl.int32)
                    outer += (in_width & (value > threshold - offset)).to(tl.int32)
            tl.store(bits + x * words + word, packed.to(tl.int32, bitcast=True), mask=in_width)
            area += _count_bits(packed)
            filled = packed | (packed >> 1)
            filled |= filled >> 2
            filled |= filled >> 4
            filled |= filled >> 8
            filled |= filled >> 16
            lowest_bit = packed & (0 - packed)
            bottom = tl.maximum(bottom, tl.where(packed != 0, first_y + _count_bits(filled), 0))
            above_it = first_y + _count_bits(lowest_bit - 1)
            from_bottom = tl.maximum(from_bottom, tl.where(packed != 0, height - above_it, 0))
        own = measures + mask * MEASURES
        in_outer = tl.sum(outer, 0)
        if in_outer > 0:
            tl.atomic_add(own + 1, tl.sum(inner, 0))
            tl.atomic_add(own + 2, in_outer)
        in_mask = tl.sum(area, 0)
        if in_mask > 0:
            tl.atomic_add(own, in_mask)
            hit = (area > 0).to(tl.int32)
            tl.atomic_max(own + 3, tl.max(hit * (width - x), 0))
            tl.atomic_max(own + 4, tl.max(from_bottom, 0))
            tl.atomic_max(own + 5, tl.max(hit * (x + 1), 0))
            tl.atomic_max(own + 6, tl.max(bottom, 0))


@triton.jit
def _tap(table, place):
    """The first of the three logits at a place along an axis."""
    return tl.load(table + place * 4).to(tl.int32)


@triton.jit
def _boundaries(bits, x, word, height, width, words):
    """[columns, words] uint32: a bit for each pixel that differs from the one before it, down the columns."""
    valid = (x < width)[:, None] & (word < words)[None, :]
    here = tl.load(bits + x[:, None] * words + word[None, :], mask=valid, other=0).to(tl.uint32, bitcast=True)
    # The word before, in the column before at its top; there is none before the first pixel.
    place = x[:, None] * words + word[None, :] - 1
    before = tl.load(bits + place, mask=valid & (place >= 0), other=0).to(tl.uint32, bitcast=True)
    last_row = tl.where(word == 0, (height - 1) % 32, 31).to(tl.uint32)
    changed = here ^ ((here << 1) | ((before >> last_row[None, :]) & 1))
    left = tl.minimum(tl.maximum(height - word * 32, 0), 32)
    every_row = tl.zeros_like(left).to(tl.uint32) - 1
    real = tl.where(left > 0, every_row >> (32 - tl.maximum(left, 1)).to(tl.uint32), 0)
    return tl.where(valid, changed & real[None, :], 0)


@triton.jit
def _count_kernel(
    plan, counts, measures, PLAN: tl.constexpr, MEASURES: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr
):
    """A program per (block of columns, mask)."""
    mine = plan + tl.program_id(1) * PLAN
    bits = tl.load(mine + 3).to(tl.pointer_type(tl.int32))
    first = tl.load(mine + 4)
    height, width, words = (
        tl.load(mine + 5).to(tl.int32),
        tl.load(mine + 6).to(tl.int32),
        tl.load(mine + 7).to(tl.int32),
    )
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(0, words, WORDS):
        changed = _boundaries(bits, x, start + tl.arange(0, WORDS), height, width, words)
        total += tl.sum(_count_bits(changed), 1)
    tl.store(counts + first + x, total, mask=x < width)
    found = tl.sum(total, 0)
    if found > 0:
        tl.atomic_add(measures + tl.program_id(1) * MEASURES + 7, found)


@triton.jit(do_not_specialize=["base"])
def _place_kernel(plan, ends, boundaries, base, PLAN: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr):
    """A program per (block of columns, mask)."""
    mine = plan + tl.program_id(1) * PLAN
    bits = tl.load(mine + 3).to(tl.pointer_type(tl.int32))
    first = tl.load(mine + 4)
    height, width, words = (
        tl.load(mine + 5).to(tl.int32),
        tl.load(mine + 6).to(tl.int32),
        tl.load(mine + 7).to(tl.int32),
    )
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(ends + first + x - 1, mask=(x < width) & (first + x > 0), other=0)  # [BLOCK], where a column begins
    for start in range(0, words, WORDS):
        word = start + tl.arange(0, WORDS)
        changed = _boundaries(bits, x, word, height, width, words)
        found = _count_bits(changed)
        rank = place[:, None] - base + tl.cumsum(found, 1) - found
        pixel = x[:, None] * height + word[None, :] * 32
        while tl.max(tl.max((changed != 0).to(tl.int32), 1), 0) > 0:  # once for each boundary of the fullest word
            lowest_bit = changed & (0 - changed)
            tl.store(boundaries + rank, pixel + _count_bits(lowest_bit - 1), mask=changed != 0)
            rank += (changed != 0).to(tl.int32)
            changed &= changed - 1
        place += tl.sum(found, 1)


def cut_masks(plan: torch.Tensor, sizes: npt.NDArray[np.int64]) -> CutBits:
    """Cut masks whose logits, tables and room for bits lie at addresses.

    Args:
        plan: [M, 9] int64 on the device, contiguous: logits [256, 256] float32, taps of rows and of columns as of
            `axis_taps`, bits [width, words] int32, all contiguous; then the columns of the masks before it, height,
            width, and words, height / 32 rounded up; then threshold and stability offset, not negative, as float32.
        sizes: [M, 2], height and width of each mask.

    Raises:
        ValueError: for a shape or dtype other than these.
    """
    masks = len(sizes)
    if plan.shape != (masks, PLAN_COLUMNS) or plan.dtype != torch.int64 or not plan.is_contiguous() or not masks:
        raise ValueError(
            f"plan must be contiguous int64 [{masks}, {PLAN_COLUMNS}], not {plan.dtype} {list(plan.shape)}"
        )
    measures = plan.new_zeros(masks, MEASURES, dtype=torch.int32)
    tiles = int((-(-sizes[:, 0] // (WORD * GROUP)) * -(-sizes[:, 1] // COLUMNS)).max())
    _cut_kernel[(tiles, masks)](
        plan, measures,
        SIDE=SIDE, WORD=WORD, COLUMNS=COLUMNS, GROUP=GROUP, PLAN=PLAN_COLUMNS, MEASURES=MEASURES,
        PATCH_ROWS=PATCH_ROWS, PATCH_COLUMNS=PATCH_COLUMNS, SLACK=SLACK, num_warps=1,
    )  # fmt: skip
    grid, options = _column_launch(sizes)
    counts = plan.new_empty(int(sizes[:, 1].sum()), dtype=torch.int32)
    _count_kernel[grid](plan, counts, measures, MEASURES=MEASURES, **options)
    return CutBits(measures, counts.cumsum(0, dtype=torch.int32))


def place_boundaries(
    plan: torch.Tensor, ends: torch.Tensor, sizes: npt.NDArray[np.int64], base: int, count: int
) -> torch.Tensor:
    """The positions of some masks' boundaries, y + x height, mask after mask: [count] int32.

    Args:
        plan, sizes: the rows of these masks, which follow one another, of what `cut_masks` takes.
        ends: of `cut_masks`, of all masks.
        base, count: boundaries of the masks before them, and their own.
    """
    boundaries = plan.new_empty(count, dtype=torch.int32)
    if count:
        grid, options = _column_launch(sizes)
        _place_kernel[grid](plan, ends, boundaries, base, **options)
    return boundaries


def _column_launch(sizes: npt.NDArray[np.int64]) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and options of the kernels that go down columns; the same for all heights, or a new one would compile."""
    return (-(-int(sizes[:, 1].max()) // BLOCK), len(sizes)), _COLUMN_OPTIONS
