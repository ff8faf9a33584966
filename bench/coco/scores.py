"""What one image scores: a centre point for each object as the prompt, three masks back, intersections over unions."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bench.coco.dataset import Id, LoadedImage, Masks
from splitsam.common.rle import decode_rle
from splitsam.decoder_service.masks import encode_rle, upsample_logits
from splitsam.decoder_service.model import DecoderModel, PromptLogits
from splitsam.decoder_service.packing import ImageJob
from splitsam.decoder_service.prompts import Prompt, Selection

DEEP_ENOUGH_PX = 20


@dataclass(frozen=True)
class Score:
    """What one object scored with one rung; every figure but `index` is an intersection over union in 0 to 1.

    Args:
        area_px: the annotation's own area, or the mask's where it has none.
        index: the mask token, 1 to 3, that the model rates best.
        flipped: `index` is not the one that fp32 rates best.
        own_choice: of mask `index` with the ground truth; the seed's figure.
        fp32_choice: of the mask that fp32 rates best with the ground truth.
        oracle: of the best of the three with the ground truth.
        vs_fp32: of the mask that fp32 rates best with fp32's own mask of that index.
        mask: fp32 only: compressed run lengths of its mask `index`.
    """

    annotation: Id
    area_px: float
    index: int
    flipped: bool
    own_choice: float
    fp32_choice: float
    oracle: float
    vs_fp32: float
    mask: str | None = None


def find_centre_point(mask: Masks) -> tuple[int, int]:
    """The point (x, y) that the seed prompts with.

    The centroid, rounded to a pixel, if the mask covers it. Otherwise, of the mask's pixels, the one whose nearest edge
    straight up, down, left or right is farthest, the image's border being an edge too; but the first in reading order
    that is 20 px from all four is good enough.

    Source: `_get_center_point` in
    https://github.com/pytorch-labs/segment-anything-fast/blob/main/experiments/data.py, whose loops stop that early.
    """
    rows, columns = np.nonzero(mask)
    x, y = round(columns.mean()), round(rows.mean())
    if mask[y, x]:
        return x, y
    depth = np.minimum.reduce(
        [
            _count_steps(mask),
            _count_steps(mask[:, ::-1])[:, ::-1],
            _count_steps(mask.T).T,
            _count_steps(mask[::-1].T).T[::-1],
        ]
    )
    deep = depth >= DEEP_ENOUGH_PX
    first = int((deep if deep.any() else depth).argmax())
    return first % mask.shape[1], first // mask.shape[1]


def measure_iou(first: Masks, second: Masks) -> float:
    """Two empty masks agree: 1."""
    union = np.count_nonzero(first | second)
    return round(np.count_nonzero(first & second) / union, 6) if union else 1.0


def score_image(
    loaded: LoadedImage, embedding: torch.Tensor, decoder: DecoderModel, reference: tuple[Score, ...] | None
) -> tuple[Score, ...]:
    """Prompt every object of an image with its centre point and compare the masks.

    Args:
        embedding: [256, 64, 64] of the image.
        reference: the same image's scores in fp32; None makes this rung the reference.
    """
    points = np.array([find_centre_point(mask) for mask in loaded.masks], np.float32)
    job = ImageJob(
        embedding=embedding,
        original_size=loaded.image.size,
        input_size=loaded.prepared.input_size[::-1],
        prompts=tuple(Prompt(points=point[None], labels=np.ones(1, np.int64)) for point in points),
        selection=Selection.ALL,
    )
    (answers,) = decoder.decode([job])
    return tuple(
        _score_object(loaded, i, answer, job, reference[i] if reference is not None else None)
        for i, answer in enumerate(answers)
    )


def _score_object(
    loaded: LoadedImage, number: int, answer: PromptLogits, job: ImageJob, reference: Score | None
) -> Score:
    full = upsample_logits(answer.logits, input_size=job.input_size, original_size=job.original_size)
    bitmaps: Masks = (full > 0).cpu().numpy()
    masks = dict(zip(answer.mask_indices, bitmaps, strict=True))
    own = answer.mask_indices[int(np.argmax(answer.predicted_iou))]
    index = reference.index if reference is not None else own
    runs = reference.mask if reference is not None else encode_rle(masks[own].view(np.uint8))
    if runs is None:
        raise ValueError("the reference holds no mask")
    item, wanted = loaded.objects[number], loaded.masks[number]
    ious = {i: measure_iou(mask, wanted) for i, mask in masks.items()}
    return Score(
        annotation=item.id,
        area_px=item.area_px if item.area_px is not None else float(np.count_nonzero(wanted)),
        index=own,
        flipped=own != index,
        own_choice=ious[own],
        fp32_choice=ious[index],
        oracle=max(ious.values()),
        vs_fp32=measure_iou(masks[index], decode_rle(job.original_size, runs)),
        mask=runs if reference is None else None,
    )


def _count_steps(mask: Masks) -> NDArray[np.int64]:
    """How many pixels one can go left from each pixel without leaving the mask; -1 outside. [H, W] to [H, W]."""
    places = np.broadcast_to(np.arange(mask.shape[1]), mask.shape)
    outside = np.maximum.accumulate(np.where(mask, -1, places), axis=1)
    return places - outside - 1
