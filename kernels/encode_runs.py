"""Run boundaries to COCO's compressed run lengths: a byte or two a run, in one text for all masks.

A mask with n boundaries b has n + 1 runs c[i] = b[i] - b[i - 1], with 0 before the first boundary and the number of
pixels after the last. COCO writes x[i] = c[i] - c[i - 2], the first three c[i] themselves, as groups of 5 bits, lowest
first, a sixth bit saying that more follow, each group as the character of its value plus 48.

A program per mask goes over its runs twice: to find how much room they take, which it then claims, and to write them.
Source of the format: `rleToString` of pycocotools.
"""

# ruff: noqa: N803 (constexpr names are Triton's)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .cut_masks import MEASURES, PLAN_COLUMNS, bits_of

MOST_CHARACTERS = 7  # of 32 bits, 5 at a time
BLOCK = 1024


@dataclass(frozen=True, eq=False)
class EncodedRuns:
    """What the kernel leaves on the device, of M masks.

    Args:
        spans: [M, 2] int32, where a mask's text begins, and its length, 0 for one whose boundaries are not all there.
        text: uint8, all texts one after the other, in no particular order.
    """

    spans: torch.Tensor
    text: torch.Tensor


@triton.jit
def _boundary(own, index, count, pixels, valid):
    """b[index] of a mask, 0 before the first and the number of pixels after the last."""
    here = tl.load(own + index, mask=valid & (index >= 0) & (index < count), other=0)
    return tl.where(index >= count, pixels, here)


@triton.jit
def _differences(own, index, count, pixels):
    """x[index], and how many characters it takes: 0 beyond the last run."""
    valid = index <= count
    run = _boundary(own, index, count, pixels, valid) - _boundary(own, index - 1, count, pixels, valid)
    second = _boundary(own, index - 2, count, pixels, valid) - _boundary(own, index - 3, count, pixels, valid)
    x = run - tl.where(index > 2, second, 0)
    size = x ^ (x >> 31)  # what its bits say beside the sign
    characters = 1 + (size >= 1 << 4).to(tl.int32) + (size >= 1 << 9).to(tl.int32) + (size >= 1 << 14).to(tl.int32)
    characters += (size >= 1 << 19).to(tl.int32) + (size >= 1 << 24).to(tl.int32) + (size >= 1 << 29).to(tl.int32)
    return x, tl.where(valid, characters, 0)


@triton.jit(do_not_specialize=["base", "room"])
def _encode_kernel(
    plan, measures, ends, boundaries, base, room, spans, text, cursor,
    PLAN: tl.constexpr, MEASURES: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """A program per mask."""
    mask = tl.program_id(0)
    _bits, first, height, width, _words = bits_of(plan, mask, PLAN)
    pixels = height * width
    begin = tl.load(ends + first - 1, mask=first > 0, other=0) - base
    own = boundaries + begin
    count = tl.load(measures + mask * MEASURES + 7)
    runs = tl.where(begin + count <= room, count + 1, 0)
    total = 0
    for start in range(0, runs, BLOCK):
        _, characters = _differences(own, start + tl.arange(0, BLOCK), count, pixels)
        total += tl.sum(characters, 0)
    place = tl.atomic_add(cursor, total)
    tl.store(spans + mask * 2, place)
    tl.store(spans + mask * 2 + 1, total)
    for start in range(0, runs, BLOCK):
        x, characters = _differences(own, start + tl.arange(0, BLOCK), count, pixels)
        at = place + tl.cumsum(characters, 0) - characters
        for i in tl.static_range(MOST):
            more = (i + 1 < characters).to(tl.int32)
            character = ((x >> (5 * i)) & 31) + 32 * more + 48
            tl.store(text + at + i, character.to(tl.uint8), mask=i < characters)
        place += tl.sum(characters, 0)


def encode_runs(
    plan: torch.Tensor, measures: torch.Tensor, ends: torch.Tensor, boundaries: torch.Tensor, base: int
) -> EncodedRuns:
    """Encode the runs of some masks that follow one another.

    Args:
        plan, measures: the rows of these masks of what `cut_masks` takes and gives.
        ends: [W] int32, of `count_boundaries`, of all masks.
        boundaries: int32, of `place_boundaries`, of these masks or the first of them.
        base: boundaries of the masks before them.
    """
    masks = len(plan)
    spans = measures.new_empty(masks, 2)
    text = torch.empty(MOST_CHARACTERS * (len(boundaries) + masks), dtype=torch.uint8, device=plan.device)
    cursor = measures.new_zeros(1)
    _encode_kernel[(masks,)](
        plan, measures, ends, boundaries, base, len(boundaries), spans, text, cursor,
        PLAN=PLAN_COLUMNS, MEASURES=MEASURES, BLOCK=BLOCK, MOST=MOST_CHARACTERS, num_warps=4,
    )  # fmt: skip
    return EncodedRuns(spans, text)
