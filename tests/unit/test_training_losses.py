"""The losses agree with numbers worked out by hand."""

import math

import pytest
import torch

from training.losses import dice_loss, focal_loss, mask_losses, measure_iou, round_loss


def test_focal_loss_of_an_undecided_pixel():
    loss = focal_loss(torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    assert loss.item() == pytest.approx(0.25 * math.log(2))


def test_focal_loss_of_a_half_covered_pixel_is_the_mean_of_both_sides():
    logits = torch.full((1, 1, 1), 1.5)
    sides = [focal_loss(logits, torch.full((1, 1, 1), value)).item() for value in (0.0, 1.0)]
    assert focal_loss(logits, torch.full((1, 1, 1), 0.5)).item() == pytest.approx(sum(sides) / 2)


def test_dice_loss_of_half_an_overlap():
    logits = torch.tensor([[[40.0, 40.0, -40.0, -40.0]]])
    coverage = torch.tensor([[[1.0, 0.0, 0.0, 1.0]]])
    assert dice_loss(logits, coverage).item() == pytest.approx(1 - (2 * 1 + 1) / (2 + 2 + 1))


def test_measure_iou_counts_pixels_over_a_half():
    logits = torch.tensor([[[1.0, 1.0, -1.0, -1.0]]])
    coverage = torch.tensor([[[1.0, 0.4, 0.6, 0.0]]])
    assert measure_iou(logits, coverage).item() == pytest.approx(1 / 3)


def test_measure_iou_of_two_empty_masks_is_zero():
    assert measure_iou(torch.full((1, 2, 2), -1.0), torch.zeros(1, 2, 2)).item() == 0


def test_mask_losses_of_a_perfect_mask_are_nearly_zero():
    coverage = (torch.rand(2, 8, 8) > 0.5).float()
    losses, iou = mask_losses((coverage[:, None] * 2 - 1).expand(-1, 4, -1, -1) * 30, coverage)
    assert losses.max() < 1e-4
    assert (iou == 1).all()


def test_round_loss_takes_the_least_of_the_three_masks():
    masks = torch.tensor([[9.0, 3.0, 1.0, 2.0]])
    iou = torch.tensor([[0.5, 0.0, 1.0, 0.0]])
    guess = torch.tensor([[0.0, 0.0, 0.5, 0.0]])
    assert round_loss(masks, iou, guess, torch.tensor([0.4]), 1.0).item() == pytest.approx(
        0.4 * 9 + 1 + 0.4 * 0.25 + 0.25
    )


def test_round_loss_of_later_rounds_counts_the_single_mask_alone():
    masks = torch.tensor([[9.0, 3.0, 1.0, 2.0]])
    loss = round_loss(masks, torch.zeros(1, 4), torch.zeros(1, 4), torch.tensor([1.0]), 0.0)
    assert loss.item() == pytest.approx(9)
