"""SAM's losses on the decoder's own grid.

Source: Kirillov et al., Segment Anything (2023), appendix A: focal x 20 + dice, the least of three masks, and a mean
squared error for the predicted IoU.
"""

import torch
import torch.nn.functional as F

FOCAL_WEIGHT = 20.0
FOCAL_GAMMA = 2.0


def focal_loss(logits: torch.Tensor, coverage: torch.Tensor) -> torch.Tensor:
    """Mean focal loss of each mask; targets may be fractions. Both [..., G, G], returns [...]."""
    probability = logits.sigmoid()
    inside = coverage * (1 - probability) ** FOCAL_GAMMA * F.logsigmoid(logits)
    outside = (1 - coverage) * probability**FOCAL_GAMMA * F.logsigmoid(-logits)
    return -(inside + outside).mean((-1, -2))


def dice_loss(logits: torch.Tensor, coverage: torch.Tensor) -> torch.Tensor:
    """One minus the dice coefficient of each mask. Both [..., G, G], returns [...]."""
    probability = logits.sigmoid()
    overlap = (probability * coverage).sum((-1, -2))
    return 1 - (2 * overlap + 1) / (probability.sum((-1, -2)) + coverage.sum((-1, -2)) + 1)


def measure_iou(logits: torch.Tensor, coverage: torch.Tensor) -> torch.Tensor:
    """Intersection over union of each mask at logit 0 with the object. Both [..., G, G], returns [...]."""
    found, wanted = logits > 0, coverage > 0.5
    union = (found | wanted).sum((-1, -2))
    return (found & wanted).sum((-1, -2)) / union.clamp(min=1)


def mask_losses(logits: torch.Tensor, coverage: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and true IoU of each of the four masks: [N, 4, G, G] and [N, G, G] to two [N, 4]."""
    logits, wanted = logits.float(), coverage[:, None]
    return FOCAL_WEIGHT * focal_loss(logits, wanted) + dice_loss(logits, wanted), measure_iou(logits, wanted)


def round_loss(
    masks: torch.Tensor, true_iou: torch.Tensor, predicted_iou: torch.Tensor, single: torch.Tensor, several: float
) -> torch.Tensor:
    """Combine the losses of one round of prompts.

    Args:
        masks: [N, 4], the loss of each mask; mask 0 is the single-mask output.
        true_iou: [N, 4].
        predicted_iou: [N, 4].
        single: [N], how much mask 0 counts.
        several: how much the best of masks 1 to 3 counts.

    Returns: [N].
    """
    counts = torch.cat([single[:, None].clamp(max=1), torch.full_like(masks[:, 1:], several)], 1)
    iou_error = (counts * (predicted_iou.float() - true_iou) ** 2).sum(1)
    return single * masks[:, 0] + several * masks[:, 1:].amin(1) + iou_error
