"""Run lengths decode to what pycocotools encoded."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco

from splitsam.client.results import Mask
from splitsam.common.rle import decode_rle

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 40))


def encoded(mask):
    rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return rle["size"], rle["counts"].decode()


@given(SHAPES.flatmap(lambda shape: arrays(bool, shape)))
def test_decode_rle_returns_the_encoded_mask(mask):
    np.testing.assert_array_equal(decode_rle(*encoded(mask)), mask)


@pytest.mark.parametrize("value", [True, False])
def test_decode_rle_of_a_large_plain_mask(value):
    mask = np.full((3000, 2000), value)
    np.testing.assert_array_equal(decode_rle(*encoded(mask)), mask)


def test_decode_rle_of_long_runs_needing_several_characters():
    mask = np.zeros((1200, 900), bool)
    mask[100:1100, 3:880] = True
    np.testing.assert_array_equal(decode_rle(*encoded(mask)), mask)


def test_decode_rle_refuses_counts_cut_short():
    size, counts = encoded(np.eye(50, dtype=bool))
    with pytest.raises(ValueError, match=r"fill|cut"):
        decode_rle(size, counts[:-1])


def test_decode_rle_refuses_another_size():
    _, counts = encoded(np.eye(50, dtype=bool))
    with pytest.raises(ValueError, match="fill"):
        decode_rle((50, 51), counts)


def described(**formats):
    return Mask(index=0, score=0, stability=0, area_px=0, box=None, width_px=13, height_px=9, **formats)


def test_to_array_agrees_between_rle_and_bits():
    mask = np.random.default_rng(0).random((9, 13)) < 0.5
    size, counts = encoded(mask)
    bits = np.packbits(mask.reshape(-1), bitorder="little").tobytes()
    np.testing.assert_array_equal(described(rle={"size": size, "counts": counts}).to_array(), mask)
    np.testing.assert_array_equal(described(bits=bits).to_array(), mask)


def test_to_array_without_pixels_names_the_formats():
    with pytest.raises(ValueError, match="rle, bits or png"):
        described().to_array()
