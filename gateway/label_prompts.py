"""Label Studio's clicks and rectangles, in percent of the image, as a prompt in pixels."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from splitsam.client.prompts import Prompt
from splitsam.gateway.errors import GatewayError


@dataclass(frozen=True)
class Click:
    """A keypoint; x and y in percent."""

    x: float
    y: float
    is_positive: bool


@dataclass(frozen=True)
class Rectangle:
    """Its top left corner, size, all in percent, and its turn about that corner, clockwise in degrees."""

    x: float
    y: float
    width: float
    height: float
    rotation: float


@dataclass(frozen=True)
class Drawn:
    """What an annotator drew to ask for one mask."""

    clicks: Sequence[Click]
    rectangle: Rectangle | None
    label: str | None

    def prompt(self, width_px: int, height_px: int) -> Prompt:
        """In pixels of an image of this size."""
        points = [(click.x * width_px / 100, click.y * height_px / 100) for click in self.clicks]
        labels = [int(click.is_positive) for click in self.clicks]
        box = None if self.rectangle is None else _box(self.rectangle, width_px, height_px)
        return Prompt(points, labels, box)


def read_drawn(results: Sequence[Mapping[str, Any]]) -> Drawn | None:
    """What the items of a context draw; None for nothing that is understood.

    Raises:
        GatewayError: a number is missing, or lies outside of the image.
    """
    clicks: list[Click] = []
    rectangle: Rectangle | None = None
    label: str | None = None
    for item in results:
        value = item.get("value")
        if not isinstance(value, Mapping):
            continue
        match item.get("type"):
            case "keypointlabels" | "keypoint":
                is_positive = item.get("is_positive", value.get("positive", True))
                clicks.append(Click(_percent(value, "x"), _percent(value, "y"), _is_true(is_positive)))
            case "rectanglelabels" | "rectangle":
                sizes = (_percent(value, "width"), _percent(value, "height"))
                turn = _number(value, "rotation") if value.get("rotation") else 0.0
                rectangle = Rectangle(_percent(value, "x"), _percent(value, "y"), *sizes, turn)
            case _:
                continue
        given = value.get(item["type"])
        label = str(given[0]) if isinstance(given, list) and given else label
    return Drawn(clicks, rectangle, label) if clicks or rectangle is not None else None


def _box(rectangle: Rectangle, width_px: int, height_px: int) -> tuple[float, float, float, float]:
    """The upright box around a rectangle, cut off at the image's edges."""
    x, y = rectangle.x * width_px / 100, rectangle.y * height_px / 100
    width, height = rectangle.width * width_px / 100, rectangle.height * height_px / 100
    turn = math.radians(rectangle.rotation)
    right, down = (math.cos(turn), math.sin(turn)), (-math.sin(turn), math.cos(turn))
    corners = [
        (x + across * right[0] + along * down[0], y + across * right[1] + along * down[1])
        for across in (0.0, width)
        for along in (0.0, height)
    ]
    xs, ys = zip(*corners, strict=True)
    return max(min(xs), 0.0), max(min(ys), 0.0), min(max(xs), width_px), min(max(ys), height_px)


def _percent(value: Mapping[str, Any], name: str) -> float:
    number = _number(value, name)
    if not 0 <= number <= 100:
        raise _bad(f"What you drew reaches out of the image: its {name} is {number:g} %, and 0 to 100 are in it.")
    return number


def _number(value: Mapping[str, Any], name: str) -> float:
    number = value.get(name)
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise _bad(f"What you drew has no number for {name}.")
    return float(number)


def _is_true(value: Any) -> bool:
    return value not in (False, 0, "0", "false", "negative")


def _bad(message: str) -> GatewayError:
    return GatewayError(400, "PROMPT_UNUSABLE", message)
