"""Masks as annotations of a COCO file."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from splitsam.client.prompts import OutputOptions
from splitsam.client.results import Mask

Form = Literal["rle", "polygons"]
Choice = Literal["auto", "single", "best"]  # one mask for one annotation


def output_options(form: Form, selection: Choice, tolerance_px: float) -> OutputOptions:
    """What to ask for; polygons come with the run lengths that stand in for those that have too few points."""
    if form == "rle":
        return {"formats": ("rle",), "selection": selection}
    return {"formats": ("polygons", "rle"), "selection": selection, "polygon_tolerance_px": tolerance_px}


def describe_mask(mask: Mask) -> dict[str, Any] | None:
    """What an annotation says of its mask; None of an empty one.

    COCO's polygons have no holes: those of the mask are filled. A mask of
    nothing but pieces too thin for one keeps its run lengths.
    """
    if mask.box is None:
        return None
    x0, y0, x1, y1 = mask.box
    rings = [piece.outer for piece in mask.polygons or () if _has_area(piece.outer)]
    return {
        "segmentation": [[round(float(value), 2) for value in ring.ravel()] for ring in rings] or mask.rle,
        "area": mask.area_px,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "predicted_iou": round(mask.score, 4),
        "stability_score": round(mask.stability, 4),
    }


def _has_area(ring: NDArray[np.float32]) -> bool:
    """Whether a ring goes around anything: pieces one pixel wide do not."""
    x, y = ring.T
    return bool(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)) != 0)


def write_export(path: Path, content: Mapping[str, Any], described: Mapping[int, Mapping[str, Any] | None]) -> None:
    """Write the file with its annotations in their order, those without a mask left out; never leaves half a file.

    Args:
        content: of the annotation file that was asked about.
        described: what is known of the masks, by the annotation's index; an empty mapping keeps one as it is.
    """
    annotations = []
    for index, entry in enumerate(content["annotations"]):
        mask = described.get(index)
        if mask is not None:
            drawn = {"bbox": entry["bbox"]} if entry.get("bbox") else {}
            annotations.append({"iscrowd": 0, **entry, **mask, **drawn})
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("w") as file:
        json.dump({**content, "annotations": annotations}, file)
    os.replace(unfinished, path)
