import numpy as np
from decoder_support import embedding, image_job, prompt

from splitsam.decoder_service.packing import (
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    FILLER,
    FOREGROUND,
    NOT_A_POINT,
    ImageJob,
    pack,
)
from splitsam.decoder_service.prompts import Prompt, Selection

SIZE = (300, 400)


def test_tiles_hold_one_token_count_each():
    asked = [prompt(j, SIZE, points=j % 3, box=j % 2 == 0, mask=True) for j in range(12)]
    for tile in pack([image_job(embedding(0), SIZE, asked)], max_prompts=64):
        # A point, two corners of a box, and a padding token behind points alone.
        counts = {j % 3 + 2 * (j % 2 == 0) + (j % 3 > 0 and j % 2 == 1) for _, j in tile.owners}
        assert counts == {tile.kinds.shape[1]}


def test_prompts_are_filled_up_to_share_tiles_where_that_is_allowed():
    asked = [prompt(j, SIZE, points=j) for j in range(1, 13)] + [prompt(13, SIZE, box=True)]
    few, many, *own = pack([image_job(embedding(0), SIZE, asked)], 64, widths=(3, 11))
    assert [len(tile.owners) for tile in (few, many, *own)] == [3, 8, 1, 1]  # 11 and 12 points have 12 and 13 tokens
    assert few.kinds.tolist()[0][1:] == [NOT_A_POINT, FILLER]
    assert few.kinds.tolist()[2] == [BOX_TOP_LEFT, BOX_BOTTOM_RIGHT, FILLER]
    assert (many.kinds == FILLER).sum(1).tolist() == list(range(7, -1, -1))
    assert not any((tile.kinds == FILLER).any() for tile in own)
    exact = {owner: row for tile in pack([image_job(embedding(0), SIZE, asked)], 64) for owner, row in rows_of(tile)}
    for tile in (few, many, *own):
        for owner, (coords, kinds) in rows_of(tile):
            np.testing.assert_array_equal(coords[kinds != FILLER], exact[owner][0])
            np.testing.assert_array_equal(kinds[kinds != FILLER], exact[owner][1])


def rows_of(tile):
    return zip(tile.owners, zip(tile.coords, tile.kinds, strict=True), strict=True)


def test_one_point_and_one_box_share_a_tile():
    asked = [prompt(0, SIZE, points=1), prompt(1, SIZE, box=True)]
    [tile] = pack([image_job(embedding(0), SIZE, asked)], max_prompts=64)
    assert tile.kinds[:, 1].tolist() == [NOT_A_POINT, BOX_BOTTOM_RIGHT]
    assert tile.kinds[1].tolist() == [BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]


def test_prompts_without_mask_share_the_source_of_their_embedding():
    values, other = embedding(0), embedding(1)
    plain, masked = prompt(0, SIZE, points=1), prompt(1, SIZE, points=1, mask=True)
    jobs = [image_job(values, SIZE, [masked, plain]), image_job(other, SIZE, [plain]), image_job(values, SIZE, [plain])]
    [tile] = pack(jobs, max_prompts=64)
    assert tile.owners == ((0, 1), (2, 0), (1, 0), (0, 0))
    assert tile.offsets.tolist() == [0, 2, 3, 4]
    assert tile.job_of_source == (0, 1, 0)
    assert tile.mask_inputs.shape == (1, 1, 256, 256)


def test_tiles_respect_the_cap_and_cover_every_prompt_once():
    jobs = [image_job(embedding(i), SIZE, [prompt(j, SIZE, points=1) for j in range(5)]) for i in range(3)]
    tiles = list(pack(jobs, max_prompts=4))
    assert [len(tile.owners) for tile in tiles] == [4, 4, 4, 3]
    assert sorted(owner for tile in tiles for owner in tile.owners) == [(i, j) for i in range(3) for j in range(5)]


def test_coordinates_scale_by_the_rounded_side_of_each_axis():
    asked = Prompt(np.array([[300, 2]], np.float32), np.array([1]))
    [tile] = pack([ImageJob(embedding(0), original_size=(3, 1000), input_size=(3, 1024), prompts=(asked,))], 64)
    np.testing.assert_array_equal(tile.coords, np.array([[[300 * 1.024, 2], [0, 0]]], np.float32))
    assert tile.kinds.tolist() == [[FOREGROUND, NOT_A_POINT]]


def test_wanted_tokens_take_one_column_unless_some_prompt_wants_all():
    asked = [prompt(0, SIZE, points=1)]
    single, every = (image_job(embedding(0), SIZE, asked, selection) for selection in (Selection.SINGLE, Selection.ALL))
    [alone], [mixed] = pack([single], 64), pack([single, every], 64)
    assert (alone.wanted.tolist(), alone.counts.tolist()) == ([[0]], [1])
    assert (mixed.wanted.tolist(), mixed.counts.tolist()) == ([[0, 0, 0], [1, 2, 3]], [1, 3])
