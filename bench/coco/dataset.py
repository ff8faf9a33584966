"""A dataset in COCO's format: `instances.json` and a folder of images, read, checked and drawn as masks.

What cannot be used is named in one line and left out; everything else stays usable.

Source: https://cocodataset.org/#format-data
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from splitsam.client.coco_file import (
    DatasetError,
    Id,
    check_annotation,
    check_image,
    check_known,
    is_number,
    read_content,
)
from splitsam.common.errors import InvalidArgument
from splitsam.common.rle import decode_rle
from splitsam.encoder_service.preprocess import ImageLimits, PreparedImage, prepare_image

Masks = NDArray[np.bool_]

SMALLEST_POLYGON = 6
UNLIMITED = ImageLimits(max_bytes=2**31, max_pixels=10**9)


@dataclass(frozen=True)
class CocoObject:
    """One annotation that is not a crowd. `place` is its path in the JSON file, `area_px` the file's own figure."""

    id: Id
    place: str
    segmentation: Any
    area_px: float | None


@dataclass(frozen=True)
class CocoImage:
    """An image that has objects. `size` is (height, width) as the JSON file gives it."""

    id: Id
    path: Path
    size: tuple[int, int]
    objects: tuple[CocoObject, ...]


@dataclass(frozen=True)
class Dataset:
    """The images that have a file and an object, in the order of the JSON file.

    Args:
        crowds: annotations left out because each covers a group.
        problems: a line for each entry that cannot be used.
    """

    images: tuple[CocoImage, ...]
    crowds: int
    problems: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class LoadedImage:
    """An image in memory with the masks of its usable objects.

    Args:
        masks: [n, height, width] bool.
        left_out: a line for each object whose segmentation cannot be used.
    """

    image: CocoImage
    prepared: PreparedImage
    objects: tuple[CocoObject, ...]
    masks: Masks
    left_out: tuple[str, ...]


def read_dataset(annotations: Path, folder: Path) -> Dataset:
    """Read the JSON file and look for the images.

    Raises:
        DatasetError: the file is not there or not in COCO's format, or no image of it can be used.
    """
    content = read_content(annotations)
    if not folder.is_dir():
        raise DatasetError(f"{folder}: is not a folder of images")
    problems: list[str] = []
    entries: dict[Id, tuple[Path, tuple[int, int]]] = {}
    for i, entry in enumerate(content["images"]):
        complaint = check_image(entry, entries)
        if complaint:
            problems.append(f"{annotations.name}: images[{i}]{complaint}")
        else:
            entries[entry["id"]] = folder / entry["file_name"], (entry["height"], entry["width"])
    objects: dict[Id, list[CocoObject]] = {}
    crowds = 0
    for i, entry in enumerate(content["annotations"]):
        place = f"annotations[{i}]"
        complaint = _check_annotation(entry) or check_known(entry["image_id"], entries)
        if complaint:
            problems.append(f"{annotations.name}: {place}{complaint}")
        elif entry.get("iscrowd", 0):
            crowds += 1
        else:
            found = CocoObject(entry.get("id", i), place, entry["segmentation"], entry.get("area"))
            objects.setdefault(entry["image_id"], []).append(found)
    images = [CocoImage(key, *entry, tuple(objects[key])) for key, entry in entries.items() if key in objects]
    usable = [image for image in images if image.path.is_file()]
    problems += [f"{image.path}: there is no such file" for image in images if not image.path.is_file()]
    if not usable:
        reason = problems[0] if problems else "no image has an annotation that is not a crowd"
        raise DatasetError(f"{annotations}: nothing can be measured: {reason}")
    return Dataset(tuple(usable), crowds, tuple(problems))


def load_image(image: CocoImage) -> LoadedImage:
    """Decode an image and draw the masks of its objects.

    Raises:
        DatasetError: the image cannot be decoded, or is not of the size that the JSON file gives.
    """
    try:
        prepared = prepare_image(image.path.read_bytes(), UNLIMITED)
    except InvalidArgument as error:
        raise DatasetError(f"{image.path}: {error.violations[0].description}") from error
    except OSError as error:
        raise DatasetError(f"{image.path}: {error.strerror or error}") from error
    height, width = image.size
    if prepared.image_size != (width, height):
        found = " x ".join(map(str, prepared.image_size))
        raise DatasetError(f"{image.path}: is {found} pixels upright, but its width and height say {width} x {height}")
    drawn, left_out = [], []
    for item in image.objects:
        try:
            drawn.append((item, draw_mask(item.segmentation, image.size)))
        except DatasetError as error:
            left_out.append(f"{item.place}.segmentation (image {image.path.name}): {error}")
    masks = np.stack([mask for _, mask in drawn]) if drawn else np.zeros((0, height, width), bool)
    return LoadedImage(image, prepared, tuple(item for item, _ in drawn), masks, tuple(left_out))


def draw_mask(segmentation: Any, size: tuple[int, int]) -> Masks:
    """Draw a segmentation as a mask.

    Args:
        segmentation: polygons (lists of x, y, x, y, ... in pixels) or a run-length encoding, compressed or not.
        size: (height, width) in pixels.

    Returns:
        [height, width] bool, with at least one pixel set.

    Raises:
        DatasetError: what is wrong with it, without its place.
    """
    if isinstance(segmentation, list):
        mask = _draw_polygons(segmentation, size)
    elif isinstance(segmentation, dict):
        mask = _draw_runs(segmentation, size)
    else:
        raise DatasetError("must be a list of polygons or a run-length encoding with size and counts")
    if not mask.any():
        raise DatasetError("covers no pixel")
    return mask


def _draw_polygons(polygons: list[Any], size: tuple[int, int]) -> Masks:
    if not polygons:
        raise DatasetError("has no polygon")
    # pycocotools crashes on coordinates far outside the image.
    reach = max(size)
    for i, polygon in enumerate(polygons):
        if not isinstance(polygon, list) or len(polygon) < SMALLEST_POLYGON or len(polygon) % 2:
            raise DatasetError(f"polygon {i} must be an even number of coordinates, at least {SMALLEST_POLYGON}")
        if not all(is_number(value) and -reach <= value <= 2 * reach for value in polygon):
            raise DatasetError(f"polygon {i} has a coordinate that is no number of pixels near the image")
    counts: bytes = coco_mask.merge(coco_mask.frPyObjects(polygons, *size))["counts"]
    return decode_rle(size, counts.decode("ascii"))


def _draw_runs(runs: Mapping[str, Any], size: tuple[int, int]) -> Masks:
    height, width = size
    if runs.get("size") != [height, width]:
        raise DatasetError(f"size must be [{height}, {width}], the image's height and width")
    counts = runs.get("counts")
    if isinstance(counts, str):
        try:
            return decode_rle(size, counts)
        except ValueError as error:
            raise DatasetError(f"counts cannot be decoded: {error}") from error
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        raise DatasetError("counts must be a string or whole numbers of at least 0")
    if sum(counts) != height * width:
        raise DatasetError(f"counts fill {sum(counts)} pixels of {height} x {width}")
    columns = np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height)
    return np.ascontiguousarray(columns.T)


def _check_annotation(entry: Any) -> str:
    """What is wrong with an entry of `annotations`, from its field on; empty when nothing is."""
    if complaint := check_annotation(entry):
        return complaint
    if "segmentation" not in entry:
        return ".segmentation: is missing"
    area = entry.get("area", 0)
    return "" if area is None or (is_number(area) and area >= 0) else ".area: must be a number of at least 0"
