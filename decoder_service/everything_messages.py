"""Protobuf to the dataclasses of `everything.py`, and back; error paths are those of `GenerateMasksRequest`."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from splitsam.common.errors import InvalidArgument, NotImplementedYet
from splitsam.decoder_service.candidates import Thresholds
from splitsam.decoder_service.everything import EverythingRequest, FoundMask, build_point_grid
from splitsam.decoder_service.messages import build_mask, parse_output
from splitsam.decoder_service.prompts import PromptLimits, check_range, validate_key, validate_output
from splitsam.v1 import decoder_pb2, types_pb2

DEFAULT_POINTS_PER_SIDE = 32
MAX_STABILITY_OFFSET = 100.0


def parse_everything(message: decoder_pb2.GenerateMasksRequest, limits: PromptLimits) -> EverythingRequest:
    """Read and check a request.

    Raises:
        InvalidArgument: naming the field and the limit.
        NotImplementedYet: it asks for what this release does not serve.
    """
    if message.WhichOneof("source") == "image":
        raise NotImplementedYet("an image is not accepted yet; encode it and send its embedding_key")
    if message.crop_layers:
        raise NotImplementedYet("crops are not served yet; leave crop_layers at 0 to search the whole image")
    validate_key(message.embedding_key, "embedding_key")
    batch = _optional(message, "points_per_batch", None)
    if batch == 0:
        raise InvalidArgument("points_per_batch", "must be 1 or more; got 0")
    request = EverythingRequest(
        embedding_key=message.embedding_key,
        grid=_parse_grid(message, limits.max_prompts),
        points_per_batch=batch,
        thresholds=_parse_thresholds(message),
        output=parse_output(message.output),
    )
    validate_output(request.output)
    return request


def build_everything(found: FoundMask) -> decoder_pb2.GenerateMasksResponse:
    """Write one mask for the wire."""
    x, y = found.point
    height, width = found.size
    return decoder_pb2.GenerateMasksResponse(
        mask=build_mask(found.mask),
        point=decoder_pb2.Point(x=x, y=y, label=decoder_pb2.POINT_LABEL_FOREGROUND),
        image_size=types_pb2.ImageSize(width=width, height=height),
    )


def _parse_grid(message: decoder_pb2.GenerateMasksRequest, max_points: int) -> npt.NDArray[np.float64]:
    if not message.point_grid:
        per_side = _optional(message, "points_per_side", DEFAULT_POINTS_PER_SIDE)
        if not 1 <= per_side <= math.isqrt(max_points):
            limit = f"{math.isqrt(max_points)}, since a request may have {max_points} points"
            raise InvalidArgument("points_per_side", f"must be 1 to {limit}; got {per_side}")
        return build_point_grid(per_side)
    if message.HasField("points_per_side"):
        raise InvalidArgument("point_grid", "takes the place of points_per_side; set one of them")
    if len(message.point_grid) % 2:
        raise InvalidArgument(
            "point_grid", f"must hold an x and a y for each point; got {len(message.point_grid)} numbers"
        )
    if len(message.point_grid) > 2 * max_points:
        raise InvalidArgument(
            "point_grid", f"must hold at most {max_points} points; got {len(message.point_grid) // 2}"
        )
    # By Python's numbers: NumPy would warn of a signalling NaN where it casts them.
    grid = np.fromiter(message.point_grid, np.float64, len(message.point_grid))
    outside = np.flatnonzero(~((grid >= 0) & (grid <= 1)))
    if len(outside):
        check_range(f"point_grid[{outside[0]}]", float(grid[outside[0]]), 0.0, 1.0)
    return grid.reshape(-1, 2)


def _parse_thresholds(message: decoder_pb2.GenerateMasksRequest) -> Thresholds:
    defaults = Thresholds()
    thresholds = Thresholds(
        predicted_iou=_optional(message, "predicted_iou_threshold", defaults.predicted_iou),
        stability_score=_optional(message, "stability_score_threshold", defaults.stability_score),
        stability_offset=_optional(message, "stability_score_offset", defaults.stability_offset),
        box_nms=_optional(message, "box_nms_threshold", defaults.box_nms),
        crop_nms=_optional(message, "crop_nms_threshold", defaults.crop_nms),
        min_region_area_px=_optional(message, "min_mask_region_area_px", defaults.min_region_area_px),
    )
    check_range("predicted_iou_threshold", thresholds.predicted_iou, 0.0, 1.0)
    check_range("stability_score_threshold", thresholds.stability_score, 0.0, 1.0)
    check_range("stability_score_offset", thresholds.stability_offset, 0.0, MAX_STABILITY_OFFSET)
    check_range("box_nms_threshold", thresholds.box_nms, 0.0, 1.0)
    check_range("crop_nms_threshold", thresholds.crop_nms, 0.0, 1.0)
    return thresholds


def _optional(message: decoder_pb2.GenerateMasksRequest, name: str, default: Any) -> Any:
    return getattr(message, name) if message.HasField(name) else default
