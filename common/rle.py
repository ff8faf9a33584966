"""COCO run-length encoding, decoded.

`pycocotools.mask.decode` would do, but up to 2.0.11 it warns of a deprecated NumPy protocol on every call, which is an
error for callers that treat warnings as errors.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_BITS_PER_CHARACTER = 5
_MORE_FOLLOW = 0x20
_SIGN = 0x10


def decode_rle(size: Sequence[int], counts: str) -> NDArray[np.bool_]:
    """Decode compressed counts.

    Args:
        size: height and width in pixels, in COCO's order.
        counts: column-major run lengths, as pycocotools compresses them.

    Returns:
        mask: [height, width] bool.

    Raises:
        ValueError: the runs do not fill the size.

    Source:
        https://github.com/cocodataset/cocoapi/blob/master/common/maskApi.c (rleFrString)
    """
    height, width = size
    runs = _run_lengths(np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48)
    if runs.sum() != height * width or (runs < 0).any():
        raise ValueError(f"the runs fill {runs.sum()} pixels of {height} x {width}")
    values = np.arange(len(runs)) % 2 == 1
    return np.ascontiguousarray(np.repeat(values, runs).reshape(width, height).T)


def _run_lengths(characters: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers are little-endian groups of characters; from the fourth on, differences to the last but one."""
    ends = np.flatnonzero((characters & _MORE_FOLLOW) == 0)
    if not len(ends) or ends[-1] != len(characters) - 1:
        raise ValueError("the counts are cut short")
    starts = np.concatenate(([0], ends[:-1] + 1))
    places = np.arange(len(characters)) - np.repeat(starts, ends - starts + 1)
    runs = np.add.reduceat((characters & (_MORE_FOLLOW - 1)) << (_BITS_PER_CHARACTER * places), starts)
    is_negative = (characters[ends] & _SIGN) != 0
    runs[is_negative] -= 1 << (_BITS_PER_CHARACTER * (places[ends][is_negative] + 1))
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs
