"""Label Studio's run-length encoding of a brush mask.

A stream of bits: the number of values (32), the bits of a value less one (5), four run sizes less one (4 each), then
runs: a flag (1: one value repeated), which of the four sizes (2), the run's length less one (in that size), the value.
Values are the bytes of an RGBA picture, row by row; of a mask all four are alike.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

_CHANNELS = 4
_VALUE_BITS = 8
_SIZES = (3, 4, 8, 16)
_LONGEST = 1 << _SIZES[-1]


def brush_rle(mask: NDArray[np.bool_]) -> list[int]:
    """A mask as Label Studio's brush regions hold it.

    Args:
        mask: [height, width] bool.

    Returns:
        The bytes of the encoding, 0 to 255 each.
    """
    values = mask.ravel()
    starts = np.concatenate(([0], np.flatnonzero(values[1:] != values[:-1]) + 1)) if len(values) else np.empty(0, int)
    lengths = np.diff(np.append(starts, len(values))) * _CHANNELS
    bits = [f"{len(values) * _CHANNELS:032b}{_VALUE_BITS - 1:05b}", *(f"{size - 1:04b}" for size in _SIZES)]
    bits.extend(_runs(lengths.tolist(), values[starts].tolist()))
    text = "".join(bits)
    padded = text + "0" * (-len(text) % 8)
    return list(int(padded, 2).to_bytes(len(padded) // 8, "big"))


def _runs(lengths: Sequence[int], values: Sequence[bool]) -> Iterator[str]:
    for length, value in zip(lengths, values, strict=True):
        colour = "11111111" if value else "00000000"
        left = length
        while left:
            taken = min(left, _LONGEST)
            index = next(index for index, size in enumerate(_SIZES) if taken <= 1 << size)
            yield f"1{index:02b}{taken - 1:0{_SIZES[index]}b}{colour}"
            left -= taken
