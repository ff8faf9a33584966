"""From low-resolution logits to masks of the upright image, measured and written in the formats asked for.

What a GPU has cut along the way comes as run lengths and is only written here. Elsewhere upsampling, thresholding and
the counts of the stability score run on the logits' device, and one byte a pixel reaches the host. Masks are worked on
together only up to `PIXELS_AT_ONCE`; beyond it one at a time, so a 64-megapixel image takes about 0.5 GB (float32
logits, three comparisons) however many masks it has.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional as F

from splitsam.common.codecs import to_fp16
from splitsam.common.shapes import IMAGE_SIDE_PX
from splitsam.decoder_service.cutting import CutMask
from splitsam.decoder_service.model import PromptLogits
from splitsam.decoder_service.prompts import FloatArray, MaskFormat, OutputOptions

PIXELS_AT_ONCE = 4_000_000
STABILITY_OFFSET = 1.0
MIN_RING_POINTS = 3
_FROM_BITMAP = {MaskFormat.PNG, MaskFormat.POLYGONS, MaskFormat.BITS}

Bitmap = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Polygon:
    """One piece of a mask: its outer ring and the rings of its holes, each [n, 2] float32 pixel centres (x, y)."""

    outer: FloatArray
    holes: tuple[FloatArray, ...] = ()


@dataclass(frozen=True, eq=False)
class Mask:
    """One mask, measured on the upright image, with the formats asked for; the others are None.

    Args:
        mask_index: the mask token that made it, 0 to 3.
        predicted_iou: the model's own estimate, about 0 to 1.
        stability_score: IoU of the masks cut one logit above and below the threshold; 0 for an empty mask.
        area_px: pixels inside.
        box: pixels x0, y0, x1, y1, the last two exclusive; None for an empty mask.
        rle_size: (height, width) in pixels.
        rle_counts: COCO's compressed run lengths, column-major.
        png: 8-bit grey, 0 or 255.
        bits: row-major, least significant bit first, rows not padded.
        low_res_logits: fp16, little-endian, row-major [256, 256].
        refinement_token: names the logits where the service kept them.
    """

    mask_index: int
    predicted_iou: float
    stability_score: float
    area_px: int
    box: tuple[int, int, int, int] | None
    rle_size: tuple[int, int] | None = None
    rle_counts: str | None = None
    png: bytes | None = None
    polygons: tuple[Polygon, ...] | None = None
    bits: bytes | None = None
    low_res_logits: bytes | None = None
    refinement_token: str | None = None

    @property
    def size_bytes(self) -> int:
        """What the formats of this mask weigh in a reply, without the few bytes of field tags and numbers."""
        texts = (self.rle_counts, self.png, self.bits, self.low_res_logits, self.refinement_token)
        rings = [ring for polygon in self.polygons or () for ring in (polygon.outer, *polygon.holes)]
        return sum(len(text) for text in texts if text is not None) + sum(ring.nbytes for ring in rings)


def are_written_at_once(answer: PromptLogits, output: OutputOptions) -> bool:
    """Whether `write_masks` has next to nothing to do, less than a thread of its own would cost."""
    return answer.cut is not None and _FROM_BITMAP.isdisjoint(output.formats)


def write_masks(
    answer: PromptLogits, *, input_size: tuple[int, int], original_size: tuple[int, int], output: OutputOptions
) -> Iterator[Mask]:
    """Turn the logits of one prompt into masks of the upright image, one after the other.

    Args:
        input_size: (height, width) of the resized image inside the padded 1024 x 1024 input.
        original_size: (height, width) of the upright image in pixels.

    Yields:
        Each mask in the order of `answer`; a caller that stops early saves the rest of the work.
    """
    if answer.cut is not None:
        for i, mask in enumerate(answer.cut):
            if mask is None:
                continue
            yield write_cut_mask(
                mask,
                output,
                mask_index=answer.mask_indices[i],
                predicted_iou=answer.predicted_iou[i],
                logits=answer.logits[i],
            )
        return
    cut = cut_masks(
        answer.logits, input_size=input_size, original_size=original_size, mask_threshold=output.mask_threshold
    )
    for i, (bitmap, stability) in enumerate(cut):
        yield write_mask(
            bitmap,
            output,
            mask_index=answer.mask_indices[i],
            predicted_iou=answer.predicted_iou[i],
            stability_score=stability,
            logits=answer.logits[i],
        )


def cut_masks(
    logits: Tensor,
    *,
    input_size: tuple[int, int],
    original_size: tuple[int, int],
    mask_threshold: float,
    stability_offset: float = STABILITY_OFFSET,
) -> Iterator[tuple[Bitmap, float]]:
    """Bring logits to the upright image and cut them at the threshold.

    Args:
        logits: [k, 256, 256] float32 of the padded input.
        input_size, original_size: as of `write_masks`.

    Yields:
        Each mask as a [height, width] bitmap of 0 and 1, and its stability score.
    """
    together = max(1, PIXELS_AT_ONCE // (original_size[0] * original_size[1]))
    for start in range(0, len(logits), together):
        chunk = logits[start : start + together]
        full = upsample_logits(chunk, input_size=input_size, original_size=original_size)
        stability = stability_scores(full, mask_threshold, stability_offset).tolist()
        bitmaps = (full > mask_threshold).view(torch.uint8).cpu().numpy()
        del full
        yield from zip(bitmaps, stability, strict=True)


def write_mask(
    bitmap: Bitmap,
    output: OutputOptions,
    *,
    mask_index: int,
    predicted_iou: float,
    stability_score: float,
    logits: Tensor | None,
) -> Mask:
    """Measure a [height, width] bitmap of 0 and 1 and write it in the formats asked for.

    Args:
        logits: [256, 256], what it was cut from; None only where LOW_RES_LOGITS is not asked for.
    """
    x, y, width, height = cv2.boundingRect(bitmap)
    rle = encode_rle(bitmap) if MaskFormat.RLE in output.formats else None
    return Mask(
        mask_index=mask_index,
        predicted_iou=predicted_iou,
        stability_score=stability_score,
        area_px=cv2.countNonZero(bitmap),
        box=(x, y, x + width, y + height) if width else None,
        rle_size=(bitmap.shape[0], bitmap.shape[1]) if rle is not None else None,
        rle_counts=rle,
        **_other_formats(output, bitmap, logits),
    )


def write_cut_mask(
    cut: CutMask, output: OutputOptions, *, mask_index: int, predicted_iou: float, logits: Tensor | None
) -> Mask:
    """The same for a mask that a GPU has cut: a bitmap is made only for formats that need one."""
    wants_rle = MaskFormat.RLE in output.formats
    bitmap = None if _FROM_BITMAP.isdisjoint(output.formats) else cut.to_bitmap()
    return Mask(
        mask_index=mask_index,
        predicted_iou=predicted_iou,
        stability_score=cut.stability_score,
        area_px=cut.area_px,
        box=cut.box,
        rle_size=cut.size if wants_rle else None,
        rle_counts=cut.rle.decode("ascii") if wants_rle else None,
        **_other_formats(output, bitmap, logits),
    )


def _other_formats(output: OutputOptions, bitmap: Bitmap | None, logits: Tensor | None) -> dict[str, Any]:
    """Of the formats asked for, all but the RLE."""
    wants = output.formats
    written: dict[str, Any] = {}
    if bitmap is not None and MaskFormat.PNG in wants:
        written["png"] = encode_png(bitmap)
    if bitmap is not None and MaskFormat.POLYGONS in wants:
        written["polygons"] = trace_polygons(bitmap, output.polygon_tolerance_px)
    if bitmap is not None and MaskFormat.BITS in wants:
        written["bits"] = encode_bits(bitmap)
    if logits is not None and MaskFormat.LOW_RES_LOGITS in wants:
        written["low_res_logits"] = encode_logits(logits)
    return written


def upsample_logits(logits: Tensor, *, input_size: tuple[int, int], original_size: tuple[int, int]) -> Tensor:
    """Bring [k, 256, 256] logits of the padded input to [k, height, width] of the upright image.

    Source: `Sam.postprocess_masks` of segment_anything.
    """
    padded = F.interpolate(logits[:, None], (IMAGE_SIDE_PX, IMAGE_SIDE_PX), mode="bilinear", align_corners=False)
    cropped = padded[..., : input_size[0], : input_size[1]]
    return F.interpolate(cropped, original_size, mode="bilinear", align_corners=False)[:, 0]


def stability_scores(logits: Tensor, threshold: float, offset: float = STABILITY_OFFSET) -> Tensor:
    """IoU of the masks cut `offset` logits above and below the threshold, [k] float64 for [k, height, width] logits.

    Source: `calculate_stability_score` of segment_anything, which overflows int16 in rows of more than 32,767 pixels
    and gives NaN for an empty mask; here it is 0.
    """
    # Counted mask by mask: on a CPU a reduction over dimensions of bools takes four times as long.
    inner = torch.stack([torch.count_nonzero(mask > threshold + offset) for mask in logits])
    outer = torch.stack([torch.count_nonzero(mask > threshold - offset) for mask in logits])
    return inner.double() / outer.clamp(min=1)


def encode_logits(logits: Tensor) -> bytes:
    """Write [256, 256] logits as fp16, little-endian, row-major: 131072 bytes, clamped to fp16's finite range."""
    return to_fp16(logits).cpu().numpy().astype("<f2").tobytes()


def encode_rle(bitmap: Bitmap) -> str:
    """COCO's compressed run lengths of a [height, width] bitmap of 0 and 1."""
    # Column-major without numpy's slow strided copy.
    counts: bytes = coco_mask.encode(cv2.transpose(bitmap).T)["counts"]
    return counts.decode("ascii")


def encode_png(bitmap: Bitmap) -> bytes:
    """An 8-bit grey PNG, 255 where a [height, width] bitmap of 0 and 1 is set."""
    written, data = cv2.imencode(".png", bitmap * np.uint8(255))
    if not written:
        raise RuntimeError(f"OpenCV could not write a PNG of {bitmap.shape}")
    return bytes(data.tobytes())


def encode_bits(bitmap: Bitmap) -> bytes:
    """One bit a pixel, row-major without padding between rows, least significant bit first."""
    return np.packbits(bitmap, axis=None, bitorder="little").tobytes()


def trace_polygons(bitmap: Bitmap, tolerance_px: float) -> tuple[Polygon, ...]:
    """Outline a [height, width] bitmap of 0 and 1 as polygons with holes.

    Rings run through the centres of the mask's own border pixels, those of holes too. A piece is never lost: an outer
    ring that simplification leaves with fewer than three points keeps its exact outline, and one of one or two pixels
    repeats its last point up to three. A hole that simplification leaves with fewer than three points is dropped.

    Args:
        tolerance_px: furthest a ring may stray from the outline (Douglas-Peucker); 0 keeps it exact.
    """
    contours, hierarchy = cv2.findContours(bitmap, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    polygons = []
    for i, contour in enumerate(contours):
        _, _, child, parent = hierarchy[0][i]
        if parent >= 0:
            continue
        outer = _simplify(contour, tolerance_px)
        if len(outer) < MIN_RING_POINTS:
            outer = contour.reshape(-1, 2).astype(np.float32)
        missing = max(0, MIN_RING_POINTS - len(outer))
        holes = []
        while child >= 0:
            hole = _simplify(contours[child], tolerance_px)
            if len(hole) >= MIN_RING_POINTS:
                holes.append(hole)
            child = hierarchy[0][child][0]
        polygons.append(Polygon(np.pad(outer, ((0, missing), (0, 0)), mode="edge"), tuple(holes)))
    return tuple(polygons)


def _simplify(contour: cv2.typing.MatLike, tolerance_px: float) -> FloatArray:
    ring = cv2.approxPolyDP(contour, tolerance_px, True) if tolerance_px > 0 else contour
    return np.asarray(ring, np.float32).reshape(-1, 2)
