"""The pieces of everything mode against torchvision's NMS as the tests know it and segment_anything's own functions."""

import numpy as np
import pytest
import torch
from torchvision_shim import batched_nms

from splitsam.decoder_service.candidates import Thresholds, remove_small_regions, sift, suppress, tidy
from splitsam.decoder_service.crops import View
from splitsam.decoder_service.everything_request import build_point_grid
from splitsam.decoder_service.model import PromptLogits
from splitsam.decoder_service.packing import ImageJob

from segment_anything.utils import amg  # isort: skip  (splitsam makes it importable)


def random_boxes(seed, count):
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.integers(0, 20, (count, 2, 2)), axis=1)  # whole pixels: many equal boxes, some without area
    return torch.from_numpy(corners.reshape(count, 4)).float()


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("count", [0, 1, 2, 200])
def test_suppress_keeps_what_torchvision_keeps(count, threshold):
    boxes = random_boxes(count, count)
    scores = torch.randint(0, 10, (count,), generator=torch.Generator().manual_seed(count)).float()  # many equal ones
    expected = batched_nms(boxes, scores, torch.zeros(count), threshold).tolist()
    assert suppress(boxes, scores, threshold) == expected


def test_suppress_keeps_a_box_whose_overlap_equals_the_threshold():
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 6.0]])
    assert suppress(boxes, torch.tensor([3.0, 2.0, 1.0]), 0.5) == [0, 1]


def test_suppress_keeps_a_box_that_only_a_suppressed_one_overlaps():
    boxes = torch.tensor([[0, 0, 10, 10], [3, 0, 13, 10], [6, 0, 16, 10.0]])
    assert suppress(boxes, torch.tensor([3.0, 2.0, 1.0]), 0.5) == [0, 2]


@pytest.mark.parametrize("min_area_px", [1, 3, 20, 10_000])
@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_small_regions_are_removed_as_in_segment_anything(density, min_area_px):
    bitmap = (np.random.default_rng(5).random((37, 53)) < density).astype(np.uint8)
    expected, filled = amg.remove_small_regions(bitmap.astype(bool), min_area_px, mode="holes")
    expected, removed = amg.remove_small_regions(expected, min_area_px, mode="islands")
    result = remove_small_regions(bitmap, min_area_px)
    np.testing.assert_array_equal(result, expected)
    assert (result is not bitmap) == (filled or removed)


def candidate_of(low_res):
    """The candidate that a [256, 256] bitmap makes on an image of 256 x 256 pixels, which is scaled by 4 and back."""
    logits = torch.from_numpy(low_res).float() * 20 - 10
    answer = PromptLogits((1,), (0.9,), logits[None])
    job = ImageJob(torch.zeros(1), (256, 256), (1024, 1024), ())
    [candidate] = sift(answer, job, View((0, 0, 256, 256), 0), (1.0, 2.0), Thresholds(0.5, 0.5), 0.0)
    return candidate


def test_candidate_becomes_its_bitmap_again_and_tidy_gives_it_a_new_box():
    bitmap = np.zeros((256, 256), np.uint8)
    bitmap[10:20, 5:25] = 1
    bitmap[250:252, 251:254] = 1
    candidate = candidate_of(bitmap)
    assert (candidate.point, candidate.mask_index, candidate.box) == ((1.0, 2.0), 1, (5, 10, 254, 252))
    np.testing.assert_array_equal(candidate.to_bitmap((256, 256)), bitmap)
    assert tidy(candidate, (256, 256), 6) is candidate
    tidied = tidy(candidate, (256, 256), 7)
    assert tidied.box == (5, 10, 25, 20)
    assert tidied.to_bitmap((256, 256)).sum() == 200


@pytest.mark.parametrize("points_per_side", [1, 2, 7, 32])
def test_point_grid_is_that_of_segment_anything(points_per_side):
    np.testing.assert_array_equal(build_point_grid(points_per_side), amg.build_point_grid(points_per_side))
