"""What callers ask for, as frozen dataclasses between the wire and the model, and the rules they must keep.

Coordinates are pixels (x, y) of the upright image; field paths in errors are those of
`protos/splitsam/v1/decoder.proto`, seen from `PredictMasksRequest`.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from splitsam.common.errors import InvalidArgument
from splitsam.common.shapes import LOW_RES_SIDE_PX

FloatArray = npt.NDArray[np.float32]
LOW_RES_LOGITS_BYTES = 2 * LOW_RES_SIDE_PX**2
MAX_TOLERANCE_PX = 100.0
MAX_THRESHOLD = 100.0
_EMBEDDING_KEY = re.compile(r"[0-9a-f]{64}")


class Selection(Enum):
    """Which of the model's masks to answer with: mask token 0, the best of tokens 1 to 3, or all three of those."""

    SINGLE = "single"
    BEST = "best"
    ALL = "all"


class MaskFormat(Enum):
    """A form in which a mask can be written."""

    RLE = "rle"
    PNG = "png"
    POLYGONS = "polygons"
    BITS = "bits"
    LOW_RES_LOGITS = "low_res_logits"


@dataclass(frozen=True)
class PromptLimits:
    """What one request may hold; see `Limits` in `types.proto` for the defaults."""

    max_images: int
    max_prompts: int
    max_points: int


@dataclass(frozen=True, eq=False)
class Prompt:
    """What to look for in one image.

    Args:
        points: [n, 2] float32, pixels (x, y) of the upright image; n may be 0.
        labels: [n] int64, 1 foreground, 0 background.
        box: [4] float32, pixels x0, y0, x1, y1, or None.
        mask_input: [256, 256] float16 or float32 logits of the padded input, or None; filled from `refinement_token`
            later.
        refinement_token: names the logits of an earlier answer, or None.
    """

    points: FloatArray
    labels: npt.NDArray[np.int64]
    box: FloatArray | None = None
    mask_input: npt.NDArray[np.floating[Any]] | None = None
    refinement_token: str | None = None

    def resolve(self, selection: Selection | None) -> Selection:
        """The selection that applies: the one asked for, or the default of `MASK_SELECTION_UNSPECIFIED`.

        Source: `SamOnnxModel` of segment_anything, which takes the best of three for one ambiguous prompt only.
        """
        if selection is not None:
            return selection
        has_mask = self.mask_input is not None or self.refinement_token is not None
        ambiguous = len(self.points) + (self.box is not None) == 1 and not has_mask
        return Selection.BEST if ambiguous else Selection.SINGLE


@dataclass(frozen=True)
class ImagePrompts:
    """Prompts on the image behind one embedding key."""

    embedding_key: str
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True)
class OutputOptions:
    """What to answer with; `selection` None leaves the choice to `Prompt.resolve`."""

    formats: tuple[MaskFormat, ...] = (MaskFormat.RLE,)
    selection: Selection | None = None
    polygon_tolerance_px: float = 1.0
    refinement_tokens: bool = False
    mask_threshold: float = 0.0


@dataclass(frozen=True)
class PredictRequest:
    """One `PredictMasks` request; `background` when nobody waits for it."""

    images: tuple[ImagePrompts, ...]
    output: OutputOptions
    background: bool = False


def validate_counts(point_counts: Sequence[Sequence[int]], limits: PromptLimits) -> None:
    """Check how many images, prompts and points there are, before any of them is parsed.

    Args:
        point_counts: for each image, the number of points of each prompt.

    Raises:
        InvalidArgument: naming the field and the limit.
    """
    if not point_counts:
        raise InvalidArgument("images", f"must hold 1 to {limits.max_images} images; got none")
    if len(point_counts) > limits.max_images:
        raise InvalidArgument("images", f"must hold at most {limits.max_images} images; got {len(point_counts)}")
    total = 0
    for i, counts in enumerate(point_counts):
        path = f"images[{i}].prompts"
        if not counts:
            raise InvalidArgument(path, "must hold at least 1 prompt; got none")
        total += len(counts)
        if total > limits.max_prompts:
            raise InvalidArgument(path, f"a request may hold at most {limits.max_prompts} prompts over all its images")
        for j, count in enumerate(counts):
            if count > limits.max_points:
                raise InvalidArgument(f"{path}[{j}].points", f"must hold at most {limits.max_points}; got {count}")


def validate_request(request: PredictRequest) -> None:
    """Check all that does not need the images' sizes, so before any embedding is fetched.

    Raises:
        InvalidArgument: naming the field and the limit.
    """
    seen: dict[str, int] = {}
    for i, image in enumerate(request.images):
        path = f"images[{i}].embedding_key"
        validate_key(image.embedding_key, path)
        if image.embedding_key in seen:
            raise InvalidArgument(path, f"repeats images[{seen[image.embedding_key]}]; each key at most once")
        seen[image.embedding_key] = i
        for j, prompt in enumerate(image.prompts):
            _validate_prompt(prompt, f"images[{i}].prompts[{j}]")
    validate_output(request.output)


def validate_key(key: str, field: str) -> None:
    """Check that a key has the form of an embedding's.

    Raises:
        InvalidArgument: it has not.
    """
    if not _EMBEDDING_KEY.fullmatch(key):
        raise InvalidArgument(field, "must be the 64 lower-case hex digits that the encoder service answered with")


def validate_output(output: OutputOptions) -> None:
    """Check the ranges of what to answer with.

    Raises:
        InvalidArgument: naming the field and the limit.
    """
    check_range("output.polygon_tolerance_px", output.polygon_tolerance_px, 0.0, MAX_TOLERANCE_PX)
    check_range("output.mask_threshold", output.mask_threshold, -MAX_THRESHOLD, MAX_THRESHOLD)


def check_range(field: str, value: float, low: float, high: float) -> None:
    """Raise InvalidArgument, naming the field and both limits, unless the value is a number between them."""
    if not low <= value <= high:
        raise InvalidArgument(field, f"must be {low:g} to {high:g}; got {value:g}")


def validate_in_image(image: ImagePrompts, index: int, *, width: int, height: int) -> None:
    """Check every coordinate of an image's prompts against the size that its embedding carries.

    Args:
        index: position of the image in the request, for the field path.
        width, height: the upright image's size in pixels.

    Raises:
        InvalidArgument: naming the coordinate and the image's width or height.
    """
    for j, prompt in enumerate(image.prompts):
        for field, axis, value in _coordinates(prompt, f"images[{index}].prompts[{j}]"):
            limit = width if axis == "width" else height
            if not 0.0 <= value <= limit:
                raise InvalidArgument(field, f"must be 0 to {limit}, the image's {axis} in pixels; got {value:g}")


def read_low_res_logits(data: bytes, field: str) -> FloatArray:
    """Decode logits as the service writes them: fp16, little-endian, row-major.

    Returns:
        [256, 256] float32 logits.

    Raises:
        InvalidArgument: not 131072 bytes, or not finite.
    """
    if len(data) != LOW_RES_LOGITS_BYTES:
        raise InvalidArgument(
            field, f"must be {LOW_RES_LOGITS_BYTES} bytes, fp16 [{LOW_RES_SIDE_PX}, {LOW_RES_SIDE_PX}]; got {len(data)}"
        )
    logits = np.frombuffer(data, dtype="<f2").astype(np.float32).reshape(LOW_RES_SIDE_PX, LOW_RES_SIDE_PX)
    if not np.isfinite(logits).all():
        raise InvalidArgument(field, "every value must be finite; found NaN or infinity")
    return logits


def _validate_prompt(prompt: Prompt, path: str) -> None:
    has_mask = prompt.mask_input is not None or prompt.refinement_token is not None
    if not len(prompt.points) and prompt.box is None and not has_mask:
        raise InvalidArgument(path, "must have at least 1 point, a box or a mask input")
    if prompt.refinement_token == "":
        raise InvalidArgument(f"{path}.refinement_token", "must not be empty when it is set")
    for field, _axis, value in _coordinates(prompt, path):
        if not math.isfinite(value):
            raise InvalidArgument(field, f"must be a finite number of pixels; got {value:g}")
    if prompt.box is not None:
        x0, y0, x1, y1 = prompt.box.tolist()
        if x0 >= x1:
            raise InvalidArgument(f"{path}.box.x0", f"must be less than x1, {x1:g}; got {x0:g}")
        if y0 >= y1:
            raise InvalidArgument(f"{path}.box.y0", f"must be less than y1, {y1:g}; got {y0:g}")


def _coordinates(prompt: Prompt, path: str) -> Iterator[tuple[str, str, float]]:
    """Yield the field path, the image side that bounds it and the value of each coordinate."""
    for k, (x, y) in enumerate(prompt.points.tolist()):
        yield f"{path}.points[{k}].x", "width", x
        yield f"{path}.points[{k}].y", "height", y
    if prompt.box is not None:
        corners = zip(("x0", "y0", "x1", "y1"), ("width", "height") * 2, prompt.box.tolist(), strict=True)
        yield from ((f"{path}.box.{name}", axis, value) for name, axis, value in corners)
