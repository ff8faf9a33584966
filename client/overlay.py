"""Masks and prompts drawn over a photo."""

import colorsys
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

Colour = tuple[int, int, int]
PALETTE: tuple[Colour, ...] = (
    (30, 144, 255),
    (255, 200, 20),
    (0, 205, 180),
    (170, 90, 255),
    (255, 99, 60),
    (255, 90, 170),
)
FOREGROUND: Colour = (40, 200, 80)
BACKGROUND: Colour = (230, 50, 50)
_WHITE: Colour = (255, 255, 255)
_FILL_OPACITY = 0.45
_SUBPIXEL_BITS = 4
_GOLDEN_RATIO = 0.618034


@dataclass(frozen=True, eq=False)
class Layer:
    """A mask and the prompt that it answers.

    Args:
        mask: [height, width] bool.
        label: its line in the legend.
        points: [N, 2] pixels (x, y).
        labels: [N] 1 foreground, 0 background; all 1 by default.
        box: x0, y0, x1, y1 pixels.
    """

    mask: NDArray[np.bool_]
    label: str = ""
    points: Sequence[Sequence[float]] = ()
    labels: Sequence[int] | None = None
    box: Sequence[float] | None = None


def open_upright(source: bytes | str | Path) -> Image.Image:
    """Open an image as the services see it: EXIF orientation undone, RGB."""
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def draw_overlay(photo: Image.Image, layers: Sequence[Layer]) -> Image.Image:
    """Draw every layer in its own colour, prompts on top, and a legend of the layers that have a label."""
    pixels = np.array(photo, np.uint8)
    unit_px = max(max(photo.size) / 1000, 0.6)
    for layer, colour in zip(layers, _colours(len(layers)), strict=True):
        pixels = _with_mask(pixels, layer.mask, colour, unit_px)
    for layer, colour in zip(layers, _colours(len(layers)), strict=True):
        if layer.box is not None:
            _draw_box(pixels, layer.box, colour, unit_px)
        labels = layer.labels if layer.labels is not None else [1] * len(layer.points)
        for point, label in zip(layer.points, labels, strict=True):
            _draw_point(pixels, point, bool(label), unit_px)
    picture = Image.fromarray(pixels)
    lines = [(layer.label, colour) for layer, colour in zip(layers, _colours(len(layers)), strict=True) if layer.label]
    return _with_legend(picture, lines, unit_px) if lines else picture


def _colours(count: int) -> list[Colour]:
    """The palette, then hues that each lie as far as they can from those just before (the golden angle)."""
    further = (colorsys.hsv_to_rgb(index * _GOLDEN_RATIO % 1, 0.8, 1.0) for index in range(count - len(PALETTE)))
    return [*PALETTE[:count], *((int(255 * red), int(255 * green), int(255 * blue)) for red, green, blue in further)]


def _with_mask(pixels: NDArray[np.uint8], mask: NDArray[np.bool_], colour: Colour, unit_px: float) -> NDArray[np.uint8]:
    inside = mask[..., None]
    tinted = pixels * (1 - _FILL_OPACITY) + np.array(colour) * _FILL_OPACITY
    blended = np.where(inside, tinted, pixels).astype(np.uint8)
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    width_px = max(round(3 * unit_px), 1)
    cv2.drawContours(blended, outlines, -1, _WHITE, width_px + 2, cv2.LINE_AA)
    cv2.drawContours(blended, outlines, -1, colour, width_px, cv2.LINE_AA)
    return blended


def _draw_box(pixels: NDArray[np.uint8], box: Sequence[float], colour: Colour, unit_px: float) -> None:
    x0, y0, x1, y1 = (round(edge) for edge in box)
    width_px = max(round(2 * unit_px), 1)
    cv2.rectangle(pixels, (x0, y0), (x1, y1), _WHITE, width_px + 2, cv2.LINE_AA)
    cv2.rectangle(pixels, (x0, y0), (x1, y1), colour, width_px, cv2.LINE_AA)


def _draw_point(pixels: NDArray[np.uint8], point: Sequence[float], is_foreground: bool, unit_px: float) -> None:
    """A disc with a white rim and a white plus or minus."""
    scale = 1 << _SUBPIXEL_BITS
    centre = (round(float(point[0]) * scale), round(float(point[1]) * scale))
    fixed: dict[str, Any] = {"lineType": cv2.LINE_AA, "shift": _SUBPIXEL_BITS}
    cv2.circle(pixels, centre, round(13 * unit_px * scale), _WHITE, -1, **fixed)
    cv2.circle(pixels, centre, round(10.5 * unit_px * scale), FOREGROUND if is_foreground else BACKGROUND, -1, **fixed)
    arm = round(5.5 * unit_px * scale)
    stroke_px = max(round(2.5 * unit_px), 1)
    cv2.line(pixels, (centre[0] - arm, centre[1]), (centre[0] + arm, centre[1]), _WHITE, stroke_px, **fixed)
    if is_foreground:
        cv2.line(pixels, (centre[0], centre[1] - arm), (centre[0], centre[1] + arm), _WHITE, stroke_px, **fixed)


def _with_legend(picture: Image.Image, lines: Sequence[tuple[str, Colour]], unit_px: float) -> Image.Image:
    """A strip under the picture, so that it hides nothing."""
    font = _font(max(round(18 * unit_px), 10))
    row_px, margin_px, swatch_px = (round(size * unit_px) for size in (30, 14, 18))
    strip_px = 2 * margin_px + row_px * len(lines)
    canvas = Image.new("RGB", (picture.width, picture.height + strip_px), (24, 26, 30))
    canvas.paste(picture, (0, 0))
    pen = ImageDraw.Draw(canvas)
    for index, (text, colour) in enumerate(lines):
        middle = picture.height + margin_px + row_px * index + row_px // 2
        corners = (margin_px, middle - swatch_px // 2, margin_px + swatch_px, middle + swatch_px // 2)
        pen.rounded_rectangle(corners, radius=max(swatch_px // 5, 1), fill=colour)
        pen.text((2 * margin_px + swatch_px, middle), text, font=font, fill=(235, 235, 235), anchor="lm")
    return canvas


@lru_cache
def _font(size_px: int) -> Any:
    return ImageFont.load_default(size_px)
