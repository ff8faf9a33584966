"""Prompts lie where a user would put them, in the token order of SAM's prompt encoder."""

import torch

from training.prompts import Prompts, correct, draw_boxes, draw_clicks, insert

SIDE = 64
CELL_PX = 1024 // SIDE


def squares() -> torch.Tensor:
    """Two objects on a 64 x 64 grid."""
    coverage = torch.zeros(2, SIDE, SIDE)
    coverage[0, 10:30, 20:50] = 1
    coverage[1, 60, 3] = 0.4
    return coverage


def cell_of(point: torch.Tensor) -> tuple[int, int]:
    x, y = (point / CELL_PX).long().tolist()
    return y, x


def test_draw_clicks_lands_inside_even_a_tiny_object():
    for seed in range(20):
        clicks = draw_clicks(squares(), torch.Generator().manual_seed(seed))
        assert clicks.labels.tolist() == [[1, -1], [1, -1]]
        y, x = cell_of(clicks.points[0, 0])
        assert 10 <= y < 30
        assert 20 <= x < 50
        assert cell_of(clicks.points[1, 0]) == (60, 3)


def test_draw_boxes_stays_near_the_object_and_in_the_frame():
    masks = squares() > 0
    for seed in range(20):
        boxes = draw_boxes(masks, torch.Generator().manual_seed(seed))
        assert boxes.labels.tolist() == [[2, 3], [2, 3]]
        exact = torch.tensor([[20, 10], [50, 30]]) * CELL_PX
        assert (boxes.points[0] - exact).abs().max() <= 20
        assert boxes.points.min() >= 0
        assert boxes.points.max() <= 1024


def test_correct_clicks_where_the_mask_is_wrong():
    coverage = squares()[:1]
    too_much = torch.where(coverage > 0, 5.0, -5.0)
    too_much[0, 40:60, 5:15] = 5.0
    too_little = torch.where(coverage > 0, 5.0, -5.0)
    too_little[0, 10:30, 40:50] = -5.0
    first = draw_clicks(coverage, torch.Generator().manual_seed(0))
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        y, x = cell_of(correct(first, too_much, coverage, generator).points[0, 1])
        assert 40 <= y < 60
        assert 5 <= x < 15
        assert correct(first, too_much, coverage, generator).labels.tolist() == [[1, 0, -1]]
        y, x = cell_of(correct(first, too_little, coverage, generator).points[0, 1])
        assert 10 <= y < 30
        assert 40 <= x < 50


def test_correct_clicks_inside_the_object_where_nothing_is_wrong():
    coverage = squares()[:1]
    first = draw_clicks(coverage, torch.Generator().manual_seed(0))
    second = correct(first, torch.where(coverage > 0, 5.0, -5.0), coverage, torch.Generator().manual_seed(1))
    assert second.labels.tolist() == [[1, 1, -1]]


def test_insert_keeps_the_corners_of_a_box_last():
    box = Prompts(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[2, 3]]))
    once = insert(box, torch.tensor([[[9.0, 9.0]]]), torch.tensor([[1]]))
    twice = insert(once, torch.tensor([[[8.0, 8.0]]]), torch.tensor([[0]]))
    assert twice.labels.tolist() == [[1, 0, 2, 3]]
    assert twice.points.tolist() == [[[9, 9], [8, 8], [1, 2], [3, 4]]]
