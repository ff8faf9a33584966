"""What is made of a mask that a GPU has cut: the same as of its bitmap."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from splitsam.decoder_service.candidates import Thresholds, place, sift, tidy
from splitsam.decoder_service.crops import View
from splitsam.decoder_service.cutting import CutMask, _pieces
from splitsam.decoder_service.masks import encode_rle, write_cut_mask, write_mask, write_masks
from splitsam.decoder_service.model import PromptLogits
from splitsam.decoder_service.packing import ImageJob
from splitsam.decoder_service.prompts import MaskFormat, OutputOptions


def cut_of(bitmap, stability=0.75):
    """What the kernels say of a [height, width] bitmap of 0 and 1."""
    x, y, width, height = cv2.boundingRect(np.ascontiguousarray(bitmap))
    box = (x, y, x + width, y + height) if width else None
    return CutMask(bitmap.shape, encode_rle(np.ascontiguousarray(bitmap)).encode(), int(bitmap.sum()), box, stability)


@settings(max_examples=100)
@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(0, 1)))
def test_run_lengths_become_the_bitmap(bitmap):
    np.testing.assert_array_equal(cut_of(bitmap).to_bitmap(), bitmap)


@pytest.mark.parametrize("formats", [(), (MaskFormat.RLE,), tuple(MaskFormat)])
def test_cut_mask_is_written_as_its_bitmap_is(formats):
    bitmap = (np.random.default_rng(1).random((60, 90)) < 0.4).astype(np.uint8)
    output, logits = OutputOptions(formats=formats), torch.randn(256, 256)
    marks = {"mask_index": 2, "predicted_iou": 0.5, "logits": logits}
    ours = write_cut_mask(cut_of(bitmap), output, **marks)
    theirs = write_mask(bitmap, output, stability_score=0.75, **marks)
    assert repr(ours) == repr(theirs)
    [of_answer] = write_masks(
        PromptLogits((2,), (0.5,), logits[None], (cut_of(bitmap),)),
        input_size=(683, 1024),
        original_size=bitmap.shape,
        output=output,
    )
    assert repr(of_answer) == repr(theirs)


def test_cut_masks_are_sifted_by_their_measures_and_tidied():
    bitmap = np.zeros((50, 70), np.uint8)
    bitmap[5:25, 10:40] = bitmap[45, 60] = 1
    masks = (cut_of(bitmap, 0.9), cut_of(bitmap, 0.2), cut_of(np.zeros_like(bitmap), 0.9))
    answer = PromptLogits((1, 2, 3), (0.8, 0.9, 0.95), torch.zeros(3, 256, 256), masks)
    job = ImageJob(torch.zeros(1), bitmap.shape, (731, 1024), ())
    view = View((100, 200, 170, 250), 1)
    [candidate] = sift(answer, job, view, (1.0, 2.0), Thresholds(0.5, 0.5), 0.0)
    assert (candidate.mask_index, candidate.box, candidate.stability_score) == (1, (10, 5, 61, 46), 0.9)
    assert candidate.size_bytes == len(masks[0].rle)
    np.testing.assert_array_equal(candidate.to_bitmap(bitmap.shape), bitmap)
    tidied = tidy(candidate, bitmap.shape, 2)
    assert tidied.box == (10, 5, 40, 25)
    assert tidied.to_bitmap(bitmap.shape).sum() == 600
    placed = place(candidate)
    assert (placed.point, placed.box) == ((101.0, 202.0), (110, 205, 161, 246))
    in_image = np.zeros((300, 400), np.uint8)
    in_image[200:250, 100:170] = bitmap
    np.testing.assert_array_equal(placed.to_bitmap(in_image.shape), in_image)


def test_masks_are_cut_in_pieces_that_fit_and_a_larger_one_alone():
    pieces = list(_pieces(np.array([3, 3, 3, 9, 1, 8, 30, 30, 0, 1]), 9))
    assert [(piece.start, piece.stop) for piece in pieces] == [(0, 3), (3, 4), (4, 6), (6, 7), (7, 8), (8, 10)]
    assert list(_pieces(np.zeros(0, np.int64), 9)) == []
    assert list(_pieces(np.zeros(3, np.int64), 9)) == [slice(0, 3)]
