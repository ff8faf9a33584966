"""Crops of everything mode: those of segment_anything, and what their edges cut off."""

import pytest
import torch
import torchvision_shim  # noqa: F401

from splitsam.common import sam_modules  # noqa: F401
from splitsam.common.errors import InvalidArgument
from splitsam.decoder_service.crops import DEFAULT_OVERLAP_RATIO, View, cut_into_views

from segment_anything.utils import amg  # isort: skip

SIZES = [(480, 640), (641, 333), (1000, 1000), (97, 2048), (8, 8)]
RATIOS = [0.0, 0.1, DEFAULT_OVERLAP_RATIO, 0.9, 1.0]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_views_are_the_crops_of_segment_anything(size, layers):
    for ratio in RATIOS:
        boxes, layer_of = amg.generate_crop_boxes(size, layers, ratio)
        views = cut_into_views(size, layers, ratio)
        assert [(list(view.box), view.layer) for view in views] == list(zip(boxes, layer_of, strict=True))
        assert [view.crop for view in views] == [None, *(tuple(box) for box in boxes[1:])]


@pytest.mark.parametrize(("size", "layers"), [((1, 1), 1), ((3, 100), 2), ((100, 5), 3)])
def test_image_too_small_for_its_layers_is_refused(size, layers):
    with pytest.raises(InvalidArgument, match="crop_layers"):
        cut_into_views(size, layers, 0.0)


def test_boxes_are_cut_off_where_segment_anything_drops_them():
    size = (300, 400)
    generator = torch.Generator().manual_seed(1)
    outcomes = []
    for view in cut_into_views(size, 2, DEFAULT_OVERLAP_RATIO):
        x0, y0, x1, y1 = view.box
        for _ in range(50):
            left, right = sorted(torch.randint(0, x1 - x0 + 1, (2,), generator=generator).tolist())
            top, bottom = sorted(torch.randint(0, y1 - y0 + 1, (2,), generator=generator).tolist())
            if right == left or bottom == top:
                continue
            inclusive = torch.tensor([[left, top, right - 1, bottom - 1]])
            expected = bool(amg.is_box_near_crop_edge(inclusive, list(view.box), [0, 0, size[1], size[0]]))
            assert view.cuts_off((left, top, right, bottom), size) == expected
            outcomes.append(expected)
    assert 0.1 < sum(outcomes) / len(outcomes) < 0.9


def test_whole_image_cuts_nothing_off():
    assert not View((0, 0, 50, 40), 0).cuts_off((0, 0, 50, 40), (40, 50))
