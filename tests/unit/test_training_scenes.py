"""Drawn scenes are labelled by what can be seen, and a seed names a scene."""

import numpy as np
import pytest
import torch

from training.objects import (
    SMALL_OBJECT_SHARE,
    SMALLEST_OBJECT_SHARE,
    choose_targets,
    list_candidates,
    measure,
    shrink_masks,
)
from training.plan import LAYERS
from training.pool import Families, Materials, draw_procedural
from training.scenes import CODES, NOTHING, PARTS, Scenes, draw_scenes

SIDE_PX = 128


@pytest.fixture(scope="module")
def materials() -> Materials:
    families = Families(("blob", "ring", "stroke"), ("clouds", "bricks"), each=2)
    return draw_procedural(families, np.random.default_rng(0), torch.device("cpu"))


@pytest.fixture(scope="module")
def scenes(materials: Materials) -> Scenes:
    return draw_scenes(materials, 6, SIDE_PX, np.random.default_rng(3))


def test_draw_scenes_repeats_for_the_same_seed(materials: Materials, scenes: Scenes):
    again = draw_scenes(materials, 6, SIDE_PX, np.random.default_rng(3))
    other = draw_scenes(materials, 6, SIDE_PX, np.random.default_rng(4))
    assert torch.equal(again.images, scenes.images)
    assert torch.equal(again.codes, scenes.codes)
    assert not torch.equal(other.codes, scenes.codes)


def test_draw_scenes_labels_padding_as_nothing_and_paints_it_black(scenes: Scenes):
    padding = ~scenes.valid[:, 0]
    assert padding.any()
    assert (scenes.codes[padding] == NOTHING).all()
    assert (scenes.codes[~padding] < LAYERS * PARTS).all()
    assert (scenes.images.permute(0, 2, 3, 1)[padding] == 0).all()


def test_list_candidates_gives_whole_objects_that_never_share_a_pixel(scenes: Scenes):
    members, _, _ = list_candidates(scenes)
    alone = members[:, :LAYERS] & ~scenes.is_child[..., None]
    assert (alone.sum(1) <= 1).all(), "a code belongs to one whole object"
    assert not members[..., NOTHING].any()
    assert members.shape[2] == CODES


def test_list_candidates_counts_a_patch_to_its_parent_as_well(scenes: Scenes):
    members, _, _ = list_candidates(scenes)
    image, patch = scenes.is_child.nonzero()[0].tolist()
    assert members[image, patch - 1, patch * PARTS]
    assert members[image, patch, patch * PARTS]
    assert not members[image, patch, (patch - 1) * PARTS]


def test_choose_targets_asks_for_objects_inside_the_frame_without_repeats(scenes: Scenes):
    targets = choose_targets(scenes, 3, torch.Generator().manual_seed(0), parts=False)
    members, often, _ = list_candidates(scenes)
    share = measure(scenes, members)[:, :LAYERS]
    there = ((share >= SMALLEST_OBJECT_SHARE) & (share < 0.9) & (often[:, :LAYERS] > 0)).sum(1)
    real = targets.weight > 0
    assert targets.masks[real].flatten(1).any(1).all()
    assert not (targets.masks & ~scenes.valid).any()
    for masks, kept, count in zip(targets.masks, real, there.tolist(), strict=True):
        unique = torch.unique(masks[kept].flatten(1), dim=0)
        assert len(unique) == min(3, count)


def test_choose_targets_for_training_asks_for_small_objects_more_often(scenes: Scenes):
    small = [0, 0]
    for seed in range(40):
        for parts in (False, True):
            targets = choose_targets(scenes, 1, torch.Generator().manual_seed(seed), parts=parts)
            share = targets.masks.float().mean((-1, -2))
            small[parts] += int(((share < SMALL_OBJECT_SHARE) & (targets.weight == 1)).sum())
    assert small[1] > small[0] > 0


def test_shrink_masks_keeps_the_area():
    masks = torch.rand(2, 3, 64, 64) > 0.5
    coverage = shrink_masks(masks, 16)
    assert coverage.shape == (2, 3, 16, 16)
    torch.testing.assert_close(coverage.mean((-1, -2)), masks.float().mean((-1, -2)))
