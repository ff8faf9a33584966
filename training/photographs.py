"""Photographs with masks drawn by hand: what a model trained on drawn pictures is measured on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

PHOTOGRAPHS = Path(__file__).parent / "photographs"
_SUBPIXEL_BITS = 4

Ring = Sequence[tuple[float, float]]


@dataclass(frozen=True, eq=False)
class Photograph:
    """A photograph and the objects outlined in it.

    Args:
        name: the file's name without its ending.
        image: [H, W, 3] uint8, RGB.
        masks: one per object, each [H, W] bool; they may overlap, as a wing does with its bee.
        mask_names: what each mask shows.
    """

    name: str
    image: NDArray[np.uint8]
    masks: list[NDArray[np.bool_]]
    mask_names: list[str]


def load_photographs(folder: Path = PHOTOGRAPHS) -> list[Photograph]:
    """Read all photographs and rasterise their masks.

    Args:
        folder: holds `masks.json` and the files it names; its README documents the format.

    Returns:
        In the order of `masks.json`.
    """
    entries = json.loads((folder / "masks.json").read_text(encoding="utf-8"))["photographs"]
    photographs = []
    for entry in entries:
        with Image.open(folder / entry["file"]) as file:
            image = np.array(file.convert("RGB"))
        masks = [rasterise(item["rings"], image.shape[0], image.shape[1]) for item in entry["objects"]]
        names = [item["name"] for item in entry["objects"]]
        photographs.append(Photograph(Path(entry["file"]).stem, image, masks, names))
    return photographs


def rasterise(rings: Sequence[Ring], height: int, width: int) -> NDArray[np.bool_]:
    """Fill polygons by the even-odd rule: a ring inside another one is a hole.

    Args:
        rings: closed polygons, pixels (x, y); whole numbers are the centres of pixels.
        height: of the mask.
        width: of the mask.

    Returns:
        [height, width] bool.
    """
    mask = np.zeros((height, width), np.uint8)
    corners = [np.rint(np.asarray(ring, np.float64) * 2**_SUBPIXEL_BITS).astype(np.int32) for ring in rings]
    cv2.fillPoly(mask, corners, color=1, shift=_SUBPIXEL_BITS)
    return mask.astype(np.bool_)
