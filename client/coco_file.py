"""What every reader of COCO annotation files checks; what is wrong is said in one line that names the field.

Source: https://cocodataset.org/#format-data
"""

import json
import math
from collections.abc import Container
from pathlib import Path
from typing import Any, TypeGuard

Id = int | str


class DatasetError(ValueError):
    """The dataset, or one image of it, cannot be used; the message is one line that names the file or field."""


def read_content(path: Path) -> dict[str, Any]:
    """The file's content, seen to have lists of images and annotations.

    Raises:
        DatasetError: the file is not there, or not in COCO's format.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: is not in COCO's format: it must be an object with images and annotations")
    for field in ("images", "annotations"):
        if not isinstance(content.get(field), list):
            raise DatasetError(f"{path}: is not in COCO's format: {field} must be a list")
    return content


def check_image(entry: Any, seen: Container[Id]) -> str:
    """What is wrong with an entry of `images`, from its field on; empty when nothing is.

    Args:
        seen: ids of the entries before it.
    """
    if not isinstance(entry, dict):
        return ": must be an object"
    if not is_id(entry.get("id")):
        return ".id: must be a whole number or a string"
    if not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
        return ".file_name: must be the name of a file"
    for field in ("height", "width"):
        if type(entry.get(field)) is not int or entry[field] < 1:
            return f".{field}: must be a whole number of pixels"
    return f".id: {entry['id']!r} is the id of an earlier image too" if entry["id"] in seen else ""


def check_annotation(entry: Any) -> str:
    """What is wrong with the ids of an entry of `annotations`, from the field on; empty when nothing is."""
    if not isinstance(entry, dict):
        return ": must be an object"
    if not is_id(entry.get("image_id")):
        return ".image_id: must be a whole number or a string"
    return "" if is_id(entry.get("id", 0)) else ".id: must be a whole number or a string"


def check_known(image_id: Id, known: Container[Id]) -> str:
    return "" if image_id in known else f".image_id: {image_id!r} is the id of no usable image"


def is_id(value: Any) -> TypeGuard[Id]:
    return type(value) in (int, str)


def is_number(value: Any) -> TypeGuard[float]:
    return (type(value) is int and abs(value) <= 2**53) or (type(value) is float and math.isfinite(value))
