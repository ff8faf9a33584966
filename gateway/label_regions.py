"""A mask as Label Studio's regions: one brush, or a polygon for each of its pieces."""

import uuid
from typing import Any

import numpy as np

from splitsam.client.prompts import Format
from splitsam.client.results import Mask
from splitsam.gateway.brush import brush_rle
from splitsam.gateway.label_config import Control

_FEWEST_POINTS = 3


def format_for(control: Control) -> Format:
    return "bits" if control.kind == "brush" else "polygons"


def regions(mask: Mask, control: Control, image_name: str, label: str | None) -> list[dict[str, Any]]:
    """The items of a prediction; none for an empty mask.

    Label Studio's polygons have no holes: those of the mask are lost, and a brush keeps them.
    """
    if mask.box is None:
        return []
    values = [_brush(mask)] if control.kind == "brush" else _polygons(mask)
    if control.labels is not None and label is not None:
        values = [value | {control.region_type: [label]} for value in values]
    return [
        {
            "id": uuid.uuid4().hex[:10],
            "from_name": control.name,
            "to_name": image_name,
            "original_width": mask.width_px,
            "original_height": mask.height_px,
            "image_rotation": 0,
            "type": control.region_type,
            "score": mask.score,
            "readonly": False,
            "value": value,
        }
        for value in values
    ]


def _brush(mask: Mask) -> dict[str, Any]:
    return {"format": "rle", "rle": brush_rle(mask.to_array())}


def _polygons(mask: Mask) -> list[dict[str, Any]]:
    """In percent; outlines go through the centres of pixels, whose percentages count from the image's edge."""
    size = np.array([mask.width_px, mask.height_px], np.float64)
    rings = (polygon.outer for polygon in mask.polygons or () if len(polygon.outer) >= _FEWEST_POINTS)
    return [{"points": np.clip((ring + 0.5) * 100 / size, 0, 100).tolist(), "closed": True} for ring in rings]
