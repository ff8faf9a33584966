"""Protobuf to the dataclasses of `everything_request.py`, and back; error paths are those of `GenerateMasksRequest`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from splitsam.common.errors import InvalidArgument
from splitsam.decoder_service.candidates import Thresholds
from splitsam.decoder_service.crops import DEFAULT_OVERLAP_RATIO
from splitsam.decoder_service.everything_request import EverythingRequest, FoundMask, build_point_grid, count_points
from splitsam.decoder_service.messages import build_mask, parse_output
from splitsam.decoder_service.prompts import check_range, validate_key, validate_output
from splitsam.v1 import decoder_pb2, types_pb2

DEFAULT_POINTS_PER_SIDE = 32
MAX_STABILITY_OFFSET = 100.0


@dataclass(frozen=True)
class SearchLimits:
    """What one `GenerateMasks` request may ask for; see `Limits` in `types.proto` for the defaults.

    Args:
        max_grid_points: of one grid.
        max_points: of the grids of the image and all its crops together.
    """

    max_image_bytes: int
    max_crop_layers: int
    max_grid_points: int
    max_points: int


def parse_origin(message: decoder_pb2.GenerateMasksRequest, limits: SearchLimits) -> str | bytes:
    """The embedding key or the image file to search.

    Raises:
        InvalidArgument: naming the field and the limit.
    """
    if message.WhichOneof("source") != "image":
        validate_key(message.embedding_key, "embedding_key")
        return message.embedding_key
    if not 1 <= len(message.image) <= limits.max_image_bytes:
        allowed = f"must have 1 to {limits.max_image_bytes} bytes"
        raise InvalidArgument("image", f"{allowed}; got {len(message.image)}")
    return message.image


def parse_everything(message: decoder_pb2.GenerateMasksRequest, limits: SearchLimits) -> EverythingRequest:
    """Read and check all but the image.

    Raises:
        InvalidArgument: naming the field and the limit.
    """
    batch = _optional(message, "points_per_batch", None)
    if batch == 0:
        raise InvalidArgument("points_per_batch", "must be 1 or more; got 0")
    overlap_ratio = _optional(message, "crop_overlap_ratio", DEFAULT_OVERLAP_RATIO)
    check_range("crop_overlap_ratio", overlap_ratio, 0.0, 1.0)
    request = EverythingRequest(
        grids=_parse_grids(message, limits),
        overlap_ratio=overlap_ratio,
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
    x0, y0, x1, y1 = found.crop
    return decoder_pb2.GenerateMasksResponse(
        mask=build_mask(found.mask),
        point=decoder_pb2.Point(x=x, y=y, label=decoder_pb2.POINT_LABEL_FOREGROUND),
        image_size=types_pb2.ImageSize(width=width, height=height),
        crop=decoder_pb2.Box(x0=x0, y0=y0, x1=x1, y1=y1),
        embedding_key=found.embedding_key,
    )


def _parse_grids(message: decoder_pb2.GenerateMasksRequest, limits: SearchLimits) -> list[npt.NDArray[np.float64]]:
    """The grid of the image, then one for each layer of crops."""
    layers = message.crop_layers
    if layers > limits.max_crop_layers:
        raise InvalidArgument("crop_layers", f"must be 0 to {limits.max_crop_layers}; got {layers}")
    if layers and message.WhichOneof("source") != "image":
        raise InvalidArgument("crop_layers", "crops are cut out of the image: send image in place of embedding_key")
    own = bool(message.point_grid)
    grids = _parse_own_grids(message, layers, limits) if own else _build_grids(message, layers, limits)
    points = count_points(grids)
    if points > limits.max_points:
        field = "point_grid" if own else "points_per_side"
        raise InvalidArgument(
            field, f"the image and its crops may have {limits.max_points} points in all; {layers} layers make {points}"
        )
    return grids


def _build_grids(
    message: decoder_pb2.GenerateMasksRequest, layers: int, limits: SearchLimits
) -> list[npt.NDArray[np.float64]]:
    if message.crop_point_grids:
        raise InvalidArgument("crop_point_grids", "go with a point_grid for the whole image; set it, too")
    per_side = _optional(message, "points_per_side", DEFAULT_POINTS_PER_SIDE)
    most = math.isqrt(limits.max_grid_points)
    if not 1 <= per_side <= most:
        limit = f"{most}, since a grid may have {limits.max_grid_points} points"
        raise InvalidArgument("points_per_side", f"must be 1 to {limit}; got {per_side}")
    factor = _optional(message, "crop_points_downscale_factor", 1)
    if factor < 1 or per_side // factor**layers < 1:
        allowed = f"must be 1 or more and leave a point along each side in layer {layers}"
        raise InvalidArgument("crop_points_downscale_factor", f"{allowed}; got {factor}")
    return [build_point_grid(per_side // factor**layer) for layer in range(layers + 1)]


def _parse_own_grids(
    message: decoder_pb2.GenerateMasksRequest, layers: int, limits: SearchLimits
) -> list[npt.NDArray[np.float64]]:
    for name in ("points_per_side", "crop_points_downscale_factor"):
        if message.HasField(name):
            raise InvalidArgument("point_grid", f"takes the place of {name}; set one of them")
    if len(message.crop_point_grids) != layers:
        given = len(message.crop_point_grids)
        raise InvalidArgument("crop_point_grids", f"must be as many as crop_layers, {layers}; got {given}")
    of_crops = ((grid.xy, f"crop_point_grids[{i}].xy") for i, grid in enumerate(message.crop_point_grids))
    given_grids = ((message.point_grid, "point_grid"), *of_crops)
    return [_parse_grid(numbers, field, limits.max_grid_points) for numbers, field in given_grids]


def _parse_grid(numbers: Sequence[float], field: str, max_points: int) -> npt.NDArray[np.float64]:
    if len(numbers) % 2:
        raise InvalidArgument(field, f"must hold an x and a y for each point; got {len(numbers)} numbers")
    if not 1 <= len(numbers) // 2 <= max_points:
        raise InvalidArgument(field, f"must hold 1 to at most {max_points} points; got {len(numbers) // 2}")
    # By Python's numbers: NumPy would warn of a signalling NaN where it casts them.
    grid = np.fromiter(numbers, np.float64, len(numbers))
    outside = np.flatnonzero(~((grid >= 0) & (grid <= 1)))
    if len(outside):
        check_range(f"{field}[{outside[0]}]", float(grid[outside[0]]), 0.0, 1.0)
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
