"""The images that prompts are put on: the evaluation photographs at 1080p, and clicks drawn over them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from torch import Tensor

from splitsam.common.shapes import IMAGE_SIDE_PX

HEIGHT, WIDTH = 1080, 1920
PHOTOGRAPHS = Path(__file__).parents[2] / "training" / "photographs"
SEED = 11
Rle = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Scene:
    """One image of 1080 x 1920 and its prompts.

    Args:
        image: [1080, 1920, 3] uint8.
        embedding: [256, 64, 64] float16 on the device.
        clicks: [n, 2] float32, pixels (x, y) of the image, each a prompt of its own.
    """

    image: np.ndarray
    embedding: Tensor
    clicks: np.ndarray
    input_size: tuple[int, int] = (round(IMAGE_SIDE_PX * HEIGHT / WIDTH), IMAGE_SIDE_PX)


def draw_images(count: int) -> list[np.ndarray]:
    """[1080, 1920, 3] uint8: the middle of each photograph, then the same mirrored, then upside down."""
    paths = sorted(PHOTOGRAPHS.glob("*.jpg"))
    images = []
    for i in range(count):
        with Image.open(paths[i % len(paths)]) as photograph:
            pixels = np.asarray(photograph.convert("RGB"))
        turn = i // len(paths)
        images.append(_fill_frame(pixels if turn == 0 else cv2.flip(pixels, 1 if turn == 1 else 0)))
    return images


def draw_clicks(count: int, most: int) -> list[np.ndarray]:
    """For each image 1 to `most` clicks; the i-th image's are the same for every count."""
    clicks = []
    for i in range(count):
        rng = np.random.default_rng((SEED, i))
        clicks.append((rng.random((rng.integers(1, most + 1), 2)) * (WIDTH, HEIGHT)).astype(np.float32))
    return clicks


def _fill_frame(pixels: np.ndarray) -> np.ndarray:
    scale = max(HEIGHT / pixels.shape[0], WIDTH / pixels.shape[1])
    rows, columns = (max(side, round(scale * old)) for side, old in zip((HEIGHT, WIDTH), pixels.shape[:2], strict=True))
    resized = cv2.resize(pixels, (columns, rows), interpolation=cv2.INTER_CUBIC)
    top, left = (rows - HEIGHT) // 2, (columns - WIDTH) // 2
    return np.ascontiguousarray(resized[top : top + HEIGHT, left : left + WIDTH])
