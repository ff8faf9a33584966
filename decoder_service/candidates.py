"""The masks that everything mode finds: which of a point's three are worth keeping, and which of all are doubles.

    logits [3, 256, 256] of a point ─► predicted IoU ─► upsample ─► stability ─► box, pixels inside it ─► Candidate
    all candidates of a view ─► NMS on boxes; of all views ─► NMS on boxes ─► small regions removed ─► NMS on boxes

Source: `SamAutomaticMaskGenerator` and `utils.amg` of segment_anything; an empty mask, which they keep when both
thresholds are 0, is dropped here.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from splitsam.decoder_service.crops import View
from splitsam.decoder_service.cutting import Cut, CutMask
from splitsam.decoder_service.masks import Bitmap, cut_masks
from splitsam.decoder_service.model import PromptLogits
from splitsam.decoder_service.packing import ImageJob

# Pieces of masks are as short-lived as their request: speed matters more than the last percent.
_COMPRESSION_LEVEL = 1


@dataclass(frozen=True)
class Thresholds:
    """What a mask must reach; see `GenerateMasksRequest`."""

    predicted_iou: float = 0.88
    stability_score: float = 0.95
    stability_offset: float = 1.0
    box_nms: float = 0.7
    crop_nms: float = 0.7
    min_region_area_px: int = 0

    def cut(self, mask_threshold: float) -> Cut:
        """What a GPU need cut for them."""
        return Cut(mask_threshold, self.stability_offset, self.predicted_iou if self.predicted_iou > 0 else None)


@dataclass(frozen=True, eq=False)
class Candidate:
    """One mask in little memory: about as much as its RLE, and never more than a bit for each pixel of its box.

    Args:
        view: the part of the image it was found in.
        point: the grid point it came from, pixels (x, y) of the upright image.
        mask_index: the mask token that made it, 1 to 3.
        box: pixels x0, y0, x1, y1, the last two exclusive.
        inside: the pixels of the box, one bit each, compressed; none where `cut` says more.
        cut: the mask as a GPU has cut it.
    """

    view: View
    point: tuple[float, float]
    mask_index: int
    predicted_iou: float
    stability_score: float
    box: tuple[int, int, int, int]
    inside: bytes = b""
    cut: CutMask | None = None

    @property
    def size_bytes(self) -> int:
        return len(self.inside) if self.cut is None else len(self.cut.rle)

    def to_bitmap(self, size: tuple[int, int]) -> Bitmap:
        """[height, width] bitmap of 0 and 1, for an image of (height, width)."""
        if self.cut is not None:
            return self.cut.to_bitmap()
        x0, y0, x1, y1 = self.box
        packed = np.frombuffer(zlib.decompress(self.inside), np.uint8)
        bitmap = np.zeros(size, np.uint8)
        bitmap[y0:y1, x0:x1] = np.unpackbits(packed, count=(y1 - y0) * (x1 - x0)).reshape(y1 - y0, x1 - x0)
        return bitmap


def sift(
    answer: PromptLogits,
    job: ImageJob,
    view: View,
    point: tuple[float, float],
    thresholds: Thresholds,
    mask_threshold: float,
) -> list[Candidate]:
    """The masks of one point that reach the thresholds, where the view has them: `place` brings them to the image.

    Args:
        answer: all three masks of the point.
        job: the view, as an image of its own.
        point: pixels (x, y) of the view.
    """
    limit = thresholds.predicted_iou
    likely = [i for i, iou in enumerate(answer.predicted_iou) if limit <= 0 or iou > limit]
    if answer.cut is not None:
        made = [(answer.cut[i], answer.mask_indices[i], answer.predicted_iou[i]) for i in likely]
        return [
            Candidate(view, point, index, iou, mask.stability_score, mask.box, cut=mask)
            for mask, index, iou in made
            if mask is not None and mask.box is not None and mask.stability_score >= thresholds.stability_score
        ]
    cut = cut_masks(
        answer.logits[likely],
        input_size=job.input_size,
        original_size=job.original_size,
        mask_threshold=mask_threshold,
        stability_offset=thresholds.stability_offset,
    )
    found = []
    for i, (bitmap, stability) in zip(likely, cut, strict=True):
        if stability < thresholds.stability_score:
            continue
        box, inside = _pack(bitmap)
        if inside:
            iou = answer.predicted_iou[i]
            found.append(Candidate(view, point, answer.mask_indices[i], iou, stability, box, inside))
    return found


def place(candidate: Candidate) -> Candidate:
    """A candidate of a crop in the image's own coordinates."""
    left, top = candidate.view.box[:2]
    inside = candidate.inside if candidate.cut is None else _pack(candidate.cut.to_bitmap())[1]
    x, y = candidate.point
    x0, y0, x1, y1 = candidate.box
    box = (left + x0, top + y0, left + x1, top + y1)
    return dataclasses.replace(candidate, point=(left + x, top + y), box=box, inside=inside, cut=None)


def drop_doubles(candidates: Sequence[Candidate], scores: Sequence[float], iou_threshold: float) -> list[Candidate]:
    """Of candidates with much the same box the one with the highest score, in order of their scores."""
    if not candidates:
        return []
    # As in segment_anything a box reaches to the middle of its last pixel: one less than ours.
    boxes = torch.tensor([candidate.box for candidate in candidates], dtype=torch.float32) - torch.tensor([0, 0, 1, 1])
    return [candidates[i] for i in suppress(boxes, torch.tensor(scores), iou_threshold)]


def drop_doubles_after_changes(
    before: Sequence[Candidate], after: Sequence[Candidate], thresholds: Thresholds
) -> list[Candidate]:
    """Drop what the removal of small regions made double, changed masks first; the others keep their order."""
    unchanged = [float(old is new) for old, new in zip(before, after, strict=True)]
    kept = drop_doubles(after, unchanged, max(thresholds.box_nms, thresholds.crop_nms))
    return [candidate for candidate in after if candidate in kept]


def suppress(boxes: Tensor, scores: Tensor, iou_threshold: float) -> list[int]:
    """Non-maximum suppression: drop each box whose IoU with a better, kept one is above the threshold.

    Args:
        boxes: [N, 4] float32 x0, y0, x1, y1.
        scores: [N].

    Returns:
        Indices of the kept boxes by descending score; of equal scores the earlier one is better.

    Source: `torchvision.ops.nms`, which is `batched_nms` for boxes of one category.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    alive = torch.ones(len(boxes), dtype=torch.bool)
    kept = []
    for i, index in enumerate(order.tolist()):
        if not alive[i]:
            continue
        kept.append(index)
        sides = torch.minimum(boxes[i, 2:], boxes[i:, 2:]) - torch.maximum(boxes[i, :2], boxes[i:, :2])
        shared = sides.clamp(min=0).prod(dim=1)
        # Two boxes without area give NaN, which is above nothing. In float64 the threshold is not rounded.
        alive[i:] &= ~((shared / (areas[i] + areas[i:] - shared)).double() > iou_threshold)
    return kept


def tidy(candidate: Candidate, size: tuple[int, int], min_area_px: int) -> Candidate:
    """The candidate without holes and pieces of fewer pixels; itself where it has none."""
    bitmap = candidate.to_bitmap(size)
    tidied = remove_small_regions(bitmap, min_area_px)
    if tidied is bitmap:
        return candidate
    box, inside = _pack(tidied)
    return dataclasses.replace(candidate, box=box, inside=inside, cut=None)


def remove_small_regions(bitmap: Bitmap, min_area_px: int) -> Bitmap:
    """Fill holes of fewer pixels, then remove such pieces, though never the largest one.

    Returns:
        A new [height, width] bitmap, or `bitmap` itself where nothing was to do.

    Source: `remove_small_regions` of segment_anything.
    """
    for holes in (True, False):
        _, regions, stats, _ = cv2.connectedComponentsWithStats(bitmap ^ np.uint8(holes), connectivity=8)
        areas = stats[1:, cv2.CC_STAT_AREA]  # region 0 is what is neither hole nor piece
        small = areas < min_area_px
        if not small.any():
            continue
        if holes:
            inside = np.concatenate([[True], small])
        else:
            small[areas.argmax()] = False
            inside = np.concatenate([[False], ~small])
        bitmap = inside[regions].astype(np.uint8)
    return bitmap


def _pack(bitmap: Bitmap) -> tuple[tuple[int, int, int, int], bytes]:
    """The box of a bitmap, x1 and y1 exclusive, and the compressed bits inside it; no bytes for an empty one."""
    x, y, width, height = cv2.boundingRect(bitmap)
    bits = np.packbits(bitmap[y : y + height, x : x + width]).tobytes()
    return (x, y, x + width, y + height), zlib.compress(bits, _COMPRESSION_LEVEL) if bits else b""
