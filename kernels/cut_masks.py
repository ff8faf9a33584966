"""Logits to the bits of masks of the upright image, for masks of any sizes together.

    v[y, x] = sum_i sum_j rows[y].w[i] columns[x].w[j] l[rows[y].start + i, columns[x].start + j]     i, j of 0, 1, 2
    bit[x, y] = v[y, x] > threshold

Both resizings of segment_anything, to the padded input and from its image to the upright one, are linear along each
axis, and neighbouring rows of the padded input touch at most three rows of logits: so they are one product with three
weights an axis, from tables that `axis_taps` makes. Bits are packed column by column, as COCO counts, 32 in a word.

A program per (128 rows x 32 columns, mask) also counts pixels above the threshold, above and below it by the stability
offset, and finds the box. A mask at 1080p has 2.1 million pixels and 0.26 MB of bits. A value lies between the logits
that it is made of, so where those are on one side of all thresholds nothing is multiplied.
"""

# ruff: noqa: N803 (constexpr names are Triton's)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

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
# Of a mask: area, pixels above the upper and above the lower threshold, what the box follows from, run boundaries.
MEASURES = 8
# The most logits that a program's extremes are found of; at 1080p there are 20 x 8.
PATCH_ROWS, PATCH_COLUMNS = 32, 16
# How far rounding may carry a value out of its logits' range, of the largest of them: some ulps.
SLACK = 1e-5


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
def count_bits(word):
    """Set bits of uint32 values, as int32."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def bits_of(plan, mask, PLAN: tl.constexpr):
    """Where the bits of a mask are, where its columns begin among all, height, width, and words in a column."""
    mine = plan + mask * PLAN
    bits, first = tl.load(mine + 3).to(tl.pointer_type(tl.int32)), tl.load(mine + 4)
    height, width, words = tl.load(mine + 5), tl.load(mine + 6), tl.load(mine + 7)
    return bits, first, height.to(tl.int32), width.to(tl.int32), words.to(tl.int32)


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
    bits, _, height, width, words = bits_of(plan, mask, PLAN)
    limits = (mine + 8).to(tl.pointer_type(tl.float32))
    threshold, offset = tl.load(limits), tl.load(limits + 1)
    groups = tl.maximum((words + GROUP - 1) // GROUP, 1)
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
            area += count_bits(packed)
            filled = packed | (packed >> 1)
            filled |= filled >> 2
            filled |= filled >> 4
            filled |= filled >> 8
            filled |= filled >> 16
            lowest_bit = packed & (0 - packed)
            bottom = tl.maximum(bottom, tl.where(packed != 0, first_y + count_bits(filled), 0))
            above_it = first_y + count_bits(lowest_bit - 1)
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


def cut_masks(plan: torch.Tensor, largest: tuple[int, int]) -> torch.Tensor:
    """Cut masks whose logits, tables and room for bits lie at addresses.

    Args:
        plan: [M, 9] int64 on the device, contiguous: logits [256, 256] float32, taps of rows and of columns as of
            `axis_taps`, bits [width, words] int32, all contiguous; then the columns of the masks before it, height,
            width, and words, height / 32 rounded up; then threshold and stability offset, not negative, as float32.
            A row of zeros is a mask without pixels.
        largest: height and width that no mask exceeds.

    Returns:
        [M, 8] int32: area, inner, outer, width - x0, height - y0, x1, y1 of the box, 0 for an empty mask; 0 for the
        boundaries that `count_boundaries` adds.

    Raises:
        ValueError: for a shape or dtype other than these.
    """
    masks = len(plan)
    if plan.shape != (masks, PLAN_COLUMNS) or plan.dtype != torch.int64 or not plan.is_contiguous() or not masks:
        raise ValueError(f"plan must be contiguous int64 [M, {PLAN_COLUMNS}], not {plan.dtype} {list(plan.shape)}")
    measures = plan.new_zeros(masks, MEASURES, dtype=torch.int32)
    tiles = triton.cdiv(largest[0], WORD * GROUP) * triton.cdiv(largest[1], COLUMNS)
    _cut_kernel[(tiles, masks)](
        plan, measures,
        SIDE=SIDE, WORD=WORD, COLUMNS=COLUMNS, GROUP=GROUP, PLAN=PLAN_COLUMNS, MEASURES=MEASURES,
        PATCH_ROWS=PATCH_ROWS, PATCH_COLUMNS=PATCH_COLUMNS, SLACK=SLACK, num_warps=1,
    )  # fmt: skip
    return measures
