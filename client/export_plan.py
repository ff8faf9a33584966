"""What `splitsam export` asks: the prompts of each image's annotations, and which annotations cannot be asked about.

Source: https://cocodataset.org/#format-data, and `point_coords` as segment_anything's own output has it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitsam.client.coco_file import DatasetError, Id, check_annotation, check_image, check_known, is_number
from splitsam.client.failures import Failure
from splitsam.client.prompts import Prompt

FIELDS = ("bbox", "point_coords", "keypoints")
# Rounding puts edges a little outside of an image; further out the image is not the one that was annotated.
_OUTSIDE_PX = 1.0
_LABELLED = (1, 2)  # a keypoint that is hidden, or seen; 0: not labelled


@dataclass(frozen=True)
class Task:
    """An annotation and its prompt; `index` counts the file's annotations, `place` names it to a person."""

    index: int
    place: str
    prompt: Prompt


@dataclass(frozen=True)
class TaskImage:
    """An image with annotations to be asked about; `size` is (width, height) as the file has it."""

    id: Id
    name: str
    path: Path
    size: tuple[int, int]
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class ExportPlan:
    """The images to ask about, in the file's order.

    Args:
        annotations: of the file.
        crowds: annotations of groups, which are kept as they are, by index.
        failures: entries that cannot be used.
    """

    annotations: int
    images: tuple[TaskImage, ...]
    crowds: tuple[int, ...]
    failures: tuple[Failure, ...]


def make_plan(content: dict[str, Any], root: Path, name: str, fields: Sequence[str], *, max_points: int) -> ExportPlan:
    """Check every entry and read its prompt.

    Args:
        content: of the annotation file, as `read_content` gives it.
        root: folder of the images.
        name: of the annotation file, for messages.
        fields: that a prompt is made of; an annotation has at least one of them.
        max_points: of one prompt.
    """
    failures: list[Failure] = []
    crowds: list[int] = []
    images: dict[Id, dict[str, Any]] = {}
    for i, entry in enumerate(content["images"]):
        if complaint := check_image(entry, images):
            failures.append(Failure(name, f"images[{i}]{complaint}", is_final=True))
        else:
            images[entry["id"]] = entry
    tasks: dict[Id, list[Task]] = {}
    seen: set[Id] = set()
    for i, entry in enumerate(content["annotations"]):
        place = f"annotations[{i}]"
        complaint = _check(entry, seen) or check_known(entry["image_id"], images)
        if not complaint:
            seen.add(entry["id"])
            place += f" (id {entry['id']})"
            if entry.get("iscrowd", 0):
                crowds.append(i)
                continue
            image = images[entry["image_id"]]
            try:
                prompt = read_prompt(entry, fields, (image["width"], image["height"]), max_points)
                tasks.setdefault(image["id"], []).append(Task(i, place, prompt))
                continue
            except DatasetError as error:
                complaint = str(error)
        failures.append(Failure(name, f"{place}{complaint}", is_final=True))
    planned = [
        TaskImage(key, entry["file_name"], root / entry["file_name"], (entry["width"], entry["height"]), tuple(asked))
        for key, entry in images.items()
        if (asked := tasks.get(key))
    ]
    return ExportPlan(len(content["annotations"]), tuple(planned), tuple(crowds), tuple(failures))


def read_prompt(entry: dict[str, Any], fields: Sequence[str], size: tuple[int, int], max_points: int) -> Prompt:
    """The prompt of an annotation, of those of the fields that it has.

    Raises:
        DatasetError: one of them cannot be used, or it has none; the message begins with the field.
    """
    box = _read_box(entry["bbox"], size) if "bbox" in fields and entry.get("bbox") else None
    points: list[tuple[float, float]] = []
    labels: list[int] = []
    if "point_coords" in fields and entry.get("point_coords"):
        points = [_read_point(point, size) for point in _read_list(entry["point_coords"], "point_coords")]
        labels = _read_labels(entry.get("point_labels"), len(points))
    if "keypoints" in fields and entry.get("keypoints"):
        shown = _read_keypoints(entry["keypoints"], size)
        points += shown
        labels += [1] * len(shown)
    if len(points) > max_points:
        raise DatasetError(f": has {len(points)} points; at most {max_points} are allowed")
    if box is None and not points:
        raise DatasetError(f": has no {' and no '.join(fields)} to make a prompt of")
    return Prompt(points, labels, box)


def _check(entry: Any, seen: set[Id]) -> str:
    if complaint := check_annotation(entry):
        return complaint
    if "id" not in entry:
        return ".id: is missing"
    return f".id: {entry['id']!r} is the id of an earlier annotation too" if entry["id"] in seen else ""


def _read_box(value: Any, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Edges x0, y0, x1, y1 within the image."""
    if not isinstance(value, list) or len(value) != 4 or not all(map(is_number, value)):
        raise DatasetError(".bbox: must be four numbers, x, y, width and height")
    x, y, width, height = value
    if width <= 0 or height <= 0:
        raise DatasetError(f".bbox: width and height must be above 0; got {width:g} and {height:g}")
    x0, y0 = _inside(".bbox", x, y, size)
    x1, y1 = _inside(".bbox", x + width, y + height, size)
    if x0 >= x1 or y0 >= y1:
        raise DatasetError(f".bbox: lies outside of the image of {size[0]} x {size[1]} pixels")
    return x0, y0, x1, y1


def _read_point(value: Any, size: tuple[int, int]) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2 or not all(map(is_number, value)):
        raise DatasetError(".point_coords: must be a list of points, two numbers each")
    x, y = value
    return _inside(".point_coords", x, y, size)


def _read_labels(value: Any, points: int) -> list[int]:
    if value is None:
        return [1] * points
    if not isinstance(value, list) or len(value) != points or any(label not in (0, 1) for label in value):
        raise DatasetError(f".point_labels: must be {points} labels, 1 on the object and 0 not on it")
    return value


def _read_keypoints(value: Any, size: tuple[int, int]) -> list[tuple[float, float]]:
    triples = _read_list(value, "keypoints")
    if len(triples) % 3 or not all(map(is_number, triples)):
        raise DatasetError(".keypoints: must be three numbers a point, x, y and visibility")
    groups = zip(triples[::3], triples[1::3], triples[2::3], strict=True)
    return [_inside(".keypoints", x, y, size) for x, y, visibility in groups if visibility in _LABELLED]


def _read_list(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise DatasetError(f".{field}: must be a list")
    return value


def _inside(field: str, x: float, y: float, size: tuple[int, int]) -> tuple[float, float]:
    """The nearest place inside of the image."""
    width, height = size
    if not (-_OUTSIDE_PX <= x <= width + _OUTSIDE_PX and -_OUTSIDE_PX <= y <= height + _OUTSIDE_PX):
        raise DatasetError(f"{field}: {x:g}, {y:g} lies outside of the image of {width} x {height} pixels")
    return min(max(x, 0.0), float(width)), min(max(y, 0.0), float(height))
