"""Protobuf to the dataclasses of `prompts.py` and `masks.py`, and back.

Field paths in errors are those of `PredictMasksRequest`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from splitsam.common.errors import InvalidArgument, ReplyTooLarge
from splitsam.decoder_service.masks import Mask, Polygon
from splitsam.decoder_service.prompts import (
    LOW_RES_LOGITS_BYTES,
    FloatArray,
    ImagePrompts,
    MaskFormat,
    OutputOptions,
    PredictRequest,
    Prompt,
    PromptLimits,
    Selection,
    read_low_res_logits,
    validate_counts,
    validate_request,
)
from splitsam.v1 import decoder_pb2, types_pb2

Value = TypeVar("Value")

LABELS: dict[int, int] = {decoder_pb2.POINT_LABEL_FOREGROUND: 1, decoder_pb2.POINT_LABEL_BACKGROUND: 0}
SELECTIONS: dict[int, Selection | None] = {
    decoder_pb2.MASK_SELECTION_UNSPECIFIED: None,
    decoder_pb2.MASK_SELECTION_SINGLE: Selection.SINGLE,
    decoder_pb2.MASK_SELECTION_BEST: Selection.BEST,
    decoder_pb2.MASK_SELECTION_ALL: Selection.ALL,
}
FORMATS: dict[int, MaskFormat] = {
    decoder_pb2.MASK_FORMAT_RLE: MaskFormat.RLE,
    decoder_pb2.MASK_FORMAT_PNG: MaskFormat.PNG,
    decoder_pb2.MASK_FORMAT_POLYGONS: MaskFormat.POLYGONS,
    decoder_pb2.MASK_FORMAT_BITS: MaskFormat.BITS,
    decoder_pb2.MASK_FORMAT_LOW_RES_LOGITS: MaskFormat.LOW_RES_LOGITS,
}
ASK_FOR_LESS = "ask for fewer prompts a request, one mask a prompt, or smaller formats such as RLE"


@dataclass(frozen=True)
class ImageMasks:
    """The answer for one image.

    Args:
        size: (height, width) of the upright image in pixels.
        orientation: EXIF 1 to 8 as undone by the encoder, 0 where the file had none.
        prompts: for each prompt its masks.
    """

    embedding_key: str
    size: tuple[int, int]
    orientation: int
    prompts: tuple[tuple[Mask, ...], ...]


@dataclass(frozen=True)
class Timings:
    """Milliseconds on the server, by stage; see `PredictTimings`."""

    fetch_ms: float = 0.0
    queue_ms: float = 0.0
    model_ms: float = 0.0
    format_ms: float = 0.0


class ReplyBudget:
    """Counts what a reply will weigh while its masks are made, to stop before the rest of an oversized one.

    Args:
        max_reply_bytes: the limit of the deployment.
    """

    def __init__(self, max_reply_bytes: int):
        self._max_bytes = max_reply_bytes
        self._spent_bytes = 0

    def spend(self, mask: Mask) -> None:
        """Count one more mask.

        Raises:
            ReplyTooLarge: saying what to ask less of.
        """
        self._spent_bytes += mask.size_bytes
        if self._spent_bytes > self._max_bytes:
            raise ReplyTooLarge(f"the reply would exceed {self._max_bytes} bytes; {ASK_FOR_LESS}")


def parse_request(message: decoder_pb2.PredictMasksRequest, limits: PromptLimits) -> PredictRequest:
    """Read and check all of a request that does not need the images' sizes.

    Raises:
        InvalidArgument: naming the field and the limit.
    """
    validate_counts([[len(prompt.points) for prompt in image.prompts] for image in message.images], limits)
    images = []
    for i, image in enumerate(message.images):
        prompts = [_parse_prompt(prompt, f"images[{i}].prompts[{j}]") for j, prompt in enumerate(image.prompts)]
        images.append(ImagePrompts(image.embedding_key, tuple(prompts)))
    request = PredictRequest(tuple(images), parse_output(message.output), message.background)
    validate_request(request)
    return request


def check_reply_can_fit(request: PredictRequest, sizes: Sequence[tuple[int, int]], max_reply_bytes: int) -> None:
    """Refuse, before any work, a request whose formats of fixed size alone exceed a reply.

    Args:
        sizes: (height, width) in pixels of each image of the request.

    Raises:
        ReplyTooLarge: saying what to ask less of.
    """
    total = 0
    for image, (height, width) in zip(request.images, sizes, strict=True):
        selections = [prompt.resolve(request.output.selection) for prompt in image.prompts]
        masks = sum(3 if selection is Selection.ALL else 1 for selection in selections)
        total += masks * fixed_bytes(request.output.formats, (height, width))
    if total > max_reply_bytes:
        raise ReplyTooLarge(
            f"BITS and LOW_RES_LOGITS of this request take {total} bytes and a reply may have {max_reply_bytes}; "
            f"{ASK_FOR_LESS}"
        )


def fixed_bytes(formats: Collection[MaskFormat], size: tuple[int, int]) -> int:
    """What BITS and LOW_RES_LOGITS of one mask of (height, width) weigh, whatever the mask is."""
    bits = (size[0] * size[1] + 7) // 8 if MaskFormat.BITS in formats else 0
    return bits + (LOW_RES_LOGITS_BYTES if MaskFormat.LOW_RES_LOGITS in formats else 0)


def build_response(
    images: Sequence[ImageMasks], timings: Timings, max_reply_bytes: int
) -> decoder_pb2.PredictMasksResponse:
    """Write an answer for the wire.

    Raises:
        ReplyTooLarge: it has more than `max_reply_bytes`; says what to ask less of.
    """
    response = decoder_pb2.PredictMasksResponse(
        images=[
            decoder_pb2.ImageMasks(
                embedding_key=image.embedding_key,
                image_size=types_pb2.ImageSize(width=image.size[1], height=image.size[0]),
                orientation=types_pb2.Orientation.Name(image.orientation),
                prompts=[
                    decoder_pb2.PromptMasks(masks=[build_mask(mask) for mask in masks]) for masks in image.prompts
                ],
            )
            for image in images
        ],
        timings=decoder_pb2.PredictTimings(
            fetch_ms=timings.fetch_ms,
            queue_ms=timings.queue_ms,
            model_ms=timings.model_ms,
            format_ms=timings.format_ms,
        ),
    )
    size = response.ByteSize()
    if size > max_reply_bytes:
        raise ReplyTooLarge(f"the reply has {size} bytes and may have {max_reply_bytes}; {ASK_FOR_LESS}")
    return response


def _parse_prompt(message: decoder_pb2.Prompt, path: str) -> Prompt:
    labels = [
        _known(LABELS, point.label, f"{path}.points[{k}].label", "must be FOREGROUND or BACKGROUND")
        for k, point in enumerate(message.points)
    ]
    points = np.array([(point.x, point.y) for point in message.points], np.float32).reshape(-1, 2)
    corners = message.box
    box = np.array([corners.x0, corners.y0, corners.x1, corners.y1], np.float32) if message.HasField("box") else None
    source = message.WhichOneof("mask_input")
    mask_input = None
    if source == "low_res_logits":
        mask_input = read_low_res_logits(message.low_res_logits, f"{path}.low_res_logits")
    token = message.refinement_token if source == "refinement_token" else None
    return Prompt(points, np.array(labels, np.int64), box, mask_input, token)


def parse_output(message: decoder_pb2.OutputOptions) -> OutputOptions:
    """Read what to answer with; its ranges are checked by `validate_output`.

    Raises:
        InvalidArgument: naming the field and what is allowed.
    """
    formats: list[MaskFormat] = []
    for i, number in enumerate(message.formats):
        path = f"output.formats[{i}]"
        chosen = _known(FORMATS, number, path, "must be RLE, PNG, POLYGONS, BITS or LOW_RES_LOGITS")
        if chosen in formats:
            raise InvalidArgument(path, f"repeats {chosen.name}; each format at most once")
        formats.append(chosen)
    defaults = OutputOptions()
    tolerance = message.polygon_tolerance_px if message.HasField("polygon_tolerance_px") else None
    return OutputOptions(
        formats=tuple(formats) or defaults.formats,
        selection=_known(SELECTIONS, message.selection, "output.selection", "must be unset, SINGLE, BEST or ALL"),
        polygon_tolerance_px=defaults.polygon_tolerance_px if tolerance is None else tolerance,
        refinement_tokens=message.refinement_tokens,
        mask_threshold=message.mask_threshold,
    )


def _known(table: Mapping[int, Value], number: int, field: str, allowed: str) -> Value:
    if number not in table:
        raise InvalidArgument(field, f"{allowed}; got {number}")
    return table[number]


def build_mask(mask: Mask) -> decoder_pb2.PredictedMask:
    """Write one mask for the wire."""
    message = decoder_pb2.PredictedMask(
        mask_index=mask.mask_index,
        predicted_iou=mask.predicted_iou,
        stability_score=mask.stability_score,
        area_px=mask.area_px,
        png=mask.png or b"",
        bits=mask.bits or b"",
        low_res_logits=mask.low_res_logits or b"",
        refinement_token=mask.refinement_token or "",
    )
    if mask.box is not None:
        x0, y0, x1, y1 = mask.box
        message.box.CopyFrom(decoder_pb2.Box(x0=x0, y0=y0, x1=x1, y1=y1))
    if mask.rle_size is not None and mask.rle_counts is not None:
        message.rle.CopyFrom(decoder_pb2.RunLengthEncoding(size=mask.rle_size, counts=mask.rle_counts))
    if mask.polygons is not None:
        pieces = [_build_polygon(polygon) for polygon in mask.polygons]
        message.polygons.CopyFrom(decoder_pb2.Polygons(polygons=pieces))
    return message


def _build_polygon(polygon: Polygon) -> decoder_pb2.Polygon:
    return decoder_pb2.Polygon(outer=_build_ring(polygon.outer), holes=[_build_ring(ring) for ring in polygon.holes])


def _build_ring(ring: FloatArray) -> decoder_pb2.Ring:
    return decoder_pb2.Ring(xy=ring.ravel().tolist())
