"""The evaluation's prompts have no chance in them, and its regions and figures are what they say."""

import numpy as np
import pytest

from training.evaluate import FIGURES, Row, find_centre, find_correction, measure_iou, summarise
from training.regions import divide_into_regions


def test_find_centre_is_farthest_from_the_outline():
    mask = np.zeros((40, 60), bool)
    mask[10:31, 20:41] = True
    assert find_centre(mask) == (30, 20)


def test_find_centre_counts_the_border_as_outline():
    mask = np.zeros((20, 40), bool)
    mask[:, :11] = True
    x, _ = find_centre(mask)
    assert x == 5


def test_find_correction_clicks_the_largest_error_with_its_label():
    wanted = np.zeros((50, 50), bool)
    wanted[5:25, 5:25] = True
    found = np.zeros_like(wanted)
    found[5:25, 5:22] = True
    found[30:45, 30:45] = True
    x, y, label = find_correction(found, wanted)
    assert label == 0
    assert 30 <= x < 45
    assert 30 <= y < 45
    assert find_correction(wanted, wanted)[2] == 1


def test_measure_iou_of_half_an_overlap():
    first, second = np.array([True, True, False]), np.array([False, True, True])
    assert measure_iou(first, second) == pytest.approx(1 / 3)


def test_summarise_splits_by_size():
    rows = [Row("a", i, share, dict.fromkeys(FIGURES, share)) for i, share in enumerate((0.005, 0.05, 0.5))]
    lines = {line["objects"]: line for line in summarise(rows)}
    assert [lines[name]["count"] for name in ("all", "small", "medium", "large")] == [3, 1, 1, 1]
    assert lines["medium"]["box_oracle"] == 0.05


def test_divide_into_regions_finds_two_flat_halves():
    image = np.zeros((80, 120, 3), np.uint8)
    image[:, 60:] = (200, 40, 40)
    regions = divide_into_regions(image, 2)
    left, right = regions[:, :50], regions[:, 70:]
    assert len(np.unique(left[left > 0])) == 1
    assert len(np.unique(right[right > 0])) == 1
    assert regions[40, 20] != regions[40, 100]
    assert (left > 0).mean() > 0.95
