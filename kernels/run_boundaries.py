"""Where the runs of masks begin and end, from their bits.

A boundary is a pixel that differs from the one before it, down the columns and from one to the next; the pixel before
the first is outside. Both kernels have a program per (8 columns, mask): one counts, and from the running sum of its
counts over all columns of all masks the other knows where to write positions y + x height, in order.
"""

# ruff: noqa: N803 (constexpr names are Triton's)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from .cut_masks import MEASURES, PLAN_COLUMNS, bits_of, count_bits

# Columns, and words of each, that a program looks at together; a column of 1080 pixels has 34 words. The same for all
# heights, or the first mask of a new height would wait for a compilation.
BLOCK, WORDS = 8, 64
_OPTIONS = {"PLAN": PLAN_COLUMNS, "BLOCK": BLOCK, "WORDS": WORDS, "num_warps": 4}


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
    bits, first, height, width, words = bits_of(plan, tl.program_id(1), PLAN)
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(0, words, WORDS):
        changed = _boundaries(bits, x, start + tl.arange(0, WORDS), height, width, words)
        total += tl.sum(count_bits(changed), 1)
    tl.store(counts + first + x, total, mask=x < width)
    found = tl.sum(total, 0)
    if found > 0:
        tl.atomic_add(measures + tl.program_id(1) * MEASURES + 7, found)


@triton.jit(do_not_specialize=["base", "room"])
def _place_kernel(plan, ends, boundaries, base, room, PLAN: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr):
    """A program per (block of columns, mask)."""
    bits, first, height, width, words = bits_of(plan, tl.program_id(1), PLAN)
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(ends + first + x - 1, mask=(x < width) & (first + x > 0), other=0)  # [BLOCK], where a column begins
    for start in range(0, words, WORDS):
        word = start + tl.arange(0, WORDS)
        changed = _boundaries(bits, x, word, height, width, words)
        found = count_bits(changed)
        rank = place[:, None] - base + tl.cumsum(found, 1) - found
        pixel = x[:, None] * height + word[None, :] * 32
        while tl.max(tl.max((changed != 0).to(tl.int32), 1), 0) > 0:  # once for each boundary of the fullest word
            lowest_bit = changed & (0 - changed)
            tl.store(boundaries + rank, pixel + count_bits(lowest_bit - 1), mask=(changed != 0) & (rank < room))
            rank += (changed != 0).to(tl.int32)
            changed &= changed - 1
        place += tl.sum(found, 1)


def count_boundaries(
    plan: torch.Tensor, measures: torch.Tensor, largest: tuple[int, int], columns: int
) -> torch.Tensor:
    """Count the boundaries of masks; those of each mask are added to its measures.

    Args:
        plan, largest: of `cut_masks`.
        measures: as it returned them.
        columns: of all masks, or more.

    Returns:
        [columns] int32, boundaries up to the end of each column, over all masks; undefined beyond the last.
    """
    counts = plan.new_empty(columns, dtype=torch.int32)
    _count_kernel[_grid(plan, largest)](plan, counts, measures, MEASURES=MEASURES, **_OPTIONS)
    return counts.cumsum(0, dtype=torch.int32)


def place_boundaries(
    plan: torch.Tensor, ends: torch.Tensor, largest: tuple[int, int], base: int, room: int
) -> torch.Tensor:
    """The positions of some masks' boundaries, y + x height, mask after mask: [room] int32.

    Args:
        plan, largest: of `cut_masks`, the rows of these masks, which follow one another.
        ends: of `count_boundaries`, of all masks.
        base: boundaries of the masks before them.
        room: for how many; those beyond are left out.
    """
    boundaries = plan.new_empty(room, dtype=torch.int32)
    if room:
        _place_kernel[_grid(plan, largest)](plan, ends, boundaries, base, room, **_OPTIONS)
    return boundaries


def _grid(plan: torch.Tensor, largest: tuple[int, int]) -> tuple[int, int]:
    return triton.cdiv(largest[1], BLOCK), len(plan)
