"""What the client answers with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splitsam.client.errors import SplitsamError
from splitsam.common.rle import decode_rle

ImageSource = bytes | str | Path
LOW_RES_SHAPE = (256, 256)


@dataclass(frozen=True)
class EncodeTimings:
    """Milliseconds on the server, by stage; 0 for a stage that did not run."""

    cache_ms: float
    preprocess_ms: float
    queue_ms: float
    model_ms: float
    store_ms: float


@dataclass(frozen=True)
class EncodedImage:
    """A handle to an image whose embedding the services keep.

    `source` (the file's bytes, or its path) lets the client encode again when the embedding has expired; the
    bytes are kept in memory as long as the handle is. Drop it with `dataclasses.replace(image, source=None)`.
    """

    key: str
    width_px: int
    height_px: int
    input_width_px: int
    input_height_px: int
    exif_orientation: int | None
    model_id: str
    cache_hit: bool
    stored: bool
    timings: EncodeTimings
    sha256: bytes = field(repr=False)
    source: ImageSource | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Polygon:
    """One piece of a mask: its outer ring and the rings cut out of it, each [N, 2] float32 (x, y) pixels."""

    outer: NDArray[np.float32]
    holes: tuple[NDArray[np.float32], ...]


@dataclass(frozen=True)
class Mask:
    """One mask and what the model says of it; the fields of formats that were not asked for are None.

    `box` is x0, y0, x1, y1 in pixels of the upright image, x1 and y1 exclusive; None for an empty mask.
    """

    index: int
    score: float
    stability: float
    area_px: int
    box: tuple[float, float, float, float] | None
    width_px: int
    height_px: int
    rle: dict[str, Any] | None = field(default=None, repr=False)
    png: bytes | None = field(default=None, repr=False)
    polygons: tuple[Polygon, ...] | None = field(default=None, repr=False, compare=False)
    bits: bytes | None = field(default=None, repr=False)
    low_res_logits: bytes | None = field(default=None, repr=False)
    refinement_token: str | None = field(default=None, repr=False)

    def to_array(self) -> NDArray[np.bool_]:
        """The mask as [height, width] bool, decoded on each call from RLE, packed bits or PNG."""
        if self.rle is not None:
            return decode_rle(self.rle["size"], self.rle["counts"])
        if self.bits is not None:
            pixels = np.frombuffer(self.bits, np.uint8)
            flat = np.unpackbits(pixels, count=self.width_px * self.height_px, bitorder="little")
            return flat.reshape(self.height_px, self.width_px).astype(bool)
        if self.png is not None:
            return _png_pixels(self.png) > 127
        raise ValueError("ask for rle, bits or png to get pixels")

    def to_logits(self) -> NDArray[np.float16]:
        """The logits before upsampling, [256, 256] over the padded 1024 x 1024 input."""
        if self.low_res_logits is None:
            raise ValueError("ask for the format low_res_logits to get logits")
        return np.frombuffer(self.low_res_logits, "<f2").reshape(LOW_RES_SHAPE)


@dataclass(frozen=True)
class FoundMask:
    """A mask of everything mode.

    Args:
        point: the grid point it came from, x and y in pixels of the upright image.
        crop: the part of the image that it was found in, x0, y0, x1, y1 in pixels: the whole, or a crop.
        key: of that part's embedding. Its refinement token belongs to it, and prompts on it count from its corner.
    """

    mask: Mask
    point: tuple[float, float]
    crop: tuple[float, float, float, float]
    key: str


@dataclass(frozen=True)
class PredictTimings:
    """Milliseconds on the server, by stage, for the whole request."""

    fetch_ms: float
    queue_ms: float
    model_ms: float
    format_ms: float


@dataclass(frozen=True)
class ImageMasks:
    """The masks of one image: `prompts[i]` are those of its i-th prompt."""

    key: str
    width_px: int
    height_px: int
    exif_orientation: int | None
    prompts: Sequence[Sequence[Mask]]
    timings: PredictTimings


@dataclass(frozen=True)
class BulkResult:
    """One image of `encode_many`, either encoded or with what went wrong; `position` counts the input from 0."""

    position: int
    source: ImageSource = field(repr=False)
    image: EncodedImage | None = None
    error: SplitsamError | OSError | None = None


@dataclass(frozen=True)
class Embedding:
    """A downloaded embedding: `values` [256, 64, 64] float32, widened from the codec it is stored in."""

    key: str
    model_id: str
    codec: str
    width_px: int
    height_px: int
    input_width_px: int
    input_height_px: int
    values: NDArray[np.float32] = field(repr=False, compare=False)


@dataclass(frozen=True)
class PointerAnswer:
    """The answer to one position of a pointer stream: masks, or why there are none."""

    request_id: int
    masks: Sequence[Mask] = ()
    superseded_by: int | None = None
    error: SplitsamError | None = None


@dataclass(frozen=True)
class ServiceInfo:
    """The model of one service and what it accepts; `limits` by their names in the API."""

    service: str
    address: str
    model: str
    model_id: str
    demonstration: bool
    precision: str
    device: str
    codec: str
    preprocess_version: str
    server_version: str
    notes: tuple[str, ...]
    limits: dict[str, Any]


@dataclass(frozen=True)
class DeploymentInfo:
    """The encoder and every decoder a client was given."""

    encoder: ServiceInfo
    decoders: tuple[ServiceInfo, ...]


def _png_pixels(png: bytes) -> NDArray[np.uint8]:
    import io

    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("L"))
