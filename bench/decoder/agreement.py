"""Do masks agree with those of segment-anything in fp32?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pycocotools import mask as coco_mask

from bench.decoder.original import Annotation, Original, encode
from bench.decoder.ours import Ours, to_rle
from bench.decoder.scenes import Rle, Scene
from splitsam.decoder_service.masks import Mask


@dataclass(frozen=True)
class Agreement:
    """Mean IoU at 1080p over prompts, and those for which another mask token is rated best."""

    miou: float
    index_flips: int


@dataclass(frozen=True)
class Reference:
    """Of each prompt of each scene the token that fp32 rates best, 1 to 3, and its mask."""

    scenes: Sequence[Scene]
    tokens: list[list[int]]
    rles: list[list[Rle]]


def make_reference(original: Original, scenes: Sequence[Scene]) -> Reference:
    tokens, rles = [], []
    for scene in scenes:
        masks, scores = original.predict(scene)
        best = scores.argmax(1)
        tokens.append((best + 1).tolist())
        rles.append([encode(mask) for mask in masks[torch.arange(len(masks)), best.cpu()].cpu().numpy()])
    return Reference(scenes, tokens, rles)


def compare(ours: Ours, reference: Reference) -> Agreement:
    """Each prompt's mask of the token that fp32 rates best."""
    ious, flips = [], 0
    for scene, tokens, rles in zip(reference.scenes, reference.tokens, reference.rles, strict=True):
        for (masks, answer), token, rle in zip(ours.write_all(scene), tokens, rles, strict=True):
            index = answer.mask_indices.index(token)
            flips += int(np.argmax(answer.predicted_iou)) != index
            ious.append(measure_iou(to_rle(masks[index]), rle))
    return Agreement(float(np.mean(ious)), flips)


def compare_everything(found: Sequence[Mask], wanted: Sequence[Annotation]) -> float:
    """Mean over the wanted masks of the IoU with the one most like it."""
    if not wanted:
        return 1.0 if not found else 0.0
    if not found:
        return 0.0
    ious = coco_mask.iou([to_rle(mask) for mask in found], [one["segmentation"] for one in wanted], [0] * len(wanted))
    return float(ious.max(axis=0).mean())


def measure_iou(one: Rle, other: Rle) -> float:
    """Two empty masks agree."""
    if not coco_mask.area(one) and not coco_mask.area(other):
        return 1.0
    return float(coco_mask.iou([one], [other], [0])[0, 0])
