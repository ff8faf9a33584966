"""Requests of everything mode, from the bytes on the wire."""

import struct

import pytest

from splitsam.common.errors import InvalidArgument
from splitsam.decoder_service.everything_messages import SearchLimits, parse_everything
from splitsam.v1 import decoder_pb2 as pb

LIMITS = SearchLimits(max_image_bytes=1, max_crop_layers=0, max_grid_points=4, max_points=4)
KEY = pb.GenerateMasksRequest(embedding_key="0a" * 32)
POINT_GRID_TAG = bytes([7 << 3 | 2])


def with_grid(*bits: int) -> pb.GenerateMasksRequest:
    """A grid of these 32-bit floats, unchanged by Python's own."""
    numbers = struct.pack(f"<{len(bits)}I", *bits)
    return pb.GenerateMasksRequest.FromString(
        KEY.SerializeToString() + POINT_GRID_TAG + bytes([len(numbers)]) + numbers
    )


@pytest.mark.parametrize("bits", [0x7FA00001, 0x7FC00000, 0xFF800000, 0xBF800000])
def test_a_grid_of_no_fractions_is_refused_without_a_warning(bits: int):
    """Signalling and quiet NaN, minus infinity, minus one."""
    with pytest.raises(InvalidArgument) as caught:
        parse_everything(with_grid(0x3F000000, bits), LIMITS)
    assert [violation.field for violation in caught.value.violations] == ["point_grid[1]"]


def test_a_grid_is_read_as_points():
    [grid] = parse_everything(with_grid(0x3F000000, 0, 0x3F800000, 0x3E800000), LIMITS).grids
    assert grid.tolist() == [[0.5, 0], [1, 0.25]]
