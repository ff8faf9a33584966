"""What everything mode is asked for, and what it finds, as frozen dataclasses between the wire and the search."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from splitsam.common.keys import Crop
from splitsam.decoder_service.candidates import Thresholds
from splitsam.decoder_service.crops import DEFAULT_OVERLAP_RATIO
from splitsam.decoder_service.masks import Mask
from splitsam.decoder_service.prompts import OutputOptions


@dataclass(frozen=True, eq=False)
class EverythingRequest:
    """What a `GenerateMasks` request asks for, without the image.

    Args:
        grids: [N, 2] float64 points (x, y) as fractions of width and height: of the image, then of the crops of each
            layer, if any are wanted.
        overlap_ratio: how far crops reach into each other; see `GenerateMasksRequest`.
        points_per_batch: points in one piece, if fewer than the server decodes at once.
    """

    grids: Sequence[npt.NDArray[np.float64]]
    overlap_ratio: float = DEFAULT_OVERLAP_RATIO
    points_per_batch: int | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)
    output: OutputOptions = field(default_factory=OutputOptions)


@dataclass(frozen=True, eq=False)
class FoundMask:
    """One mask of everything mode.

    Args:
        point: the grid point it came from, pixels (x, y) of the upright image.
        size: (height, width) of the upright image in pixels.
        crop: the part of the image that it was found in, pixels x0, y0, x1, y1.
        embedding_key: of that part.
    """

    mask: Mask
    point: tuple[float, float]
    size: tuple[int, int]
    crop: Crop
    embedding_key: str


def count_points(grids: Sequence[npt.NDArray[np.float64]]) -> int:
    """Points on the image and all its crops, by the grids of each layer."""
    return sum(len(grid) * 4**layer for layer, grid in enumerate(grids))


def build_point_grid(points_per_side: int) -> npt.NDArray[np.float64]:
    """Evenly spaced points (x, y) in fractions of the image, row by row: [points_per_side ** 2, 2] float64."""
    offset = 1 / (2 * points_per_side)
    along = np.linspace(offset, 1 - offset, points_per_side)
    x, y = np.meshgrid(along, along)
    return np.stack([x, y], axis=-1).reshape(-1, 2)
