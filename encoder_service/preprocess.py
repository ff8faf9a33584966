"""From the bytes of an image file to the pixels the encoder takes. Blocking: the service runs it on threads.

identify the format; check the size in the header; decode the first frame; to RGB; upright; crop; longest side to 1024.
"""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from splitsam.common.errors import InvalidArgument
from splitsam.common.keys import Crop
from splitsam.common.shapes import IMAGE_FORMATS, IMAGE_SIDE_PX
from splitsam.encoder_service.image_header import (
    JPEG,
    PNG,
    WEBP,
    DamagedImage,
    identify_format,
    read_orientation,
    read_webp_size,
    strip_jpeg,
    strip_png,
)

# Part of every embedding's key. Raise it with any change that alters a pixel the encoder sees (decoding, colour,
# orientation, resizing, normalisation, padding), a newer Pillow that decodes differently included; embeddings made
# before are then out of use.
PREPROCESS_VERSION = "1"

MAX_ASPECT_RATIO = 2 * IMAGE_SIDE_PX

# Constructed directly: Image.open would add a warning above its own pixel limit, before ours could be checked.
_OPENERS: dict[str, Callable[[BytesIO], ImageFile.ImageFile]] = {
    JPEG: JpegImageFile,
    PNG: PngImageFile,
    WEBP: WebPImageFile,
}
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDES_SWAPPED = (5, 6, 7, 8)


@dataclass(frozen=True)
class ImageLimits:
    """What an image may be; every refusal names the limit.

    Args:
        max_bytes: of the file.
        max_pixels: width times height.
        formats: of `IMAGE_FORMATS`, told by content.
    """

    max_bytes: int = 32 * 2**20
    max_pixels: int = 64_000_000
    formats: tuple[str, ...] = IMAGE_FORMATS


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image as the encoder takes it.

    Args:
        pixels: [h, w, 3] uint8, RGB, upright, the longer side 1024.
        image_size: (width, height) in pixels of the upright image, or of the crop of it; prompts refer to it.
        input_size: (width, height) of `pixels`, before padding to 1024 x 1024.
        orientation: EXIF 1 to 8 that was undone; 0 when the file has none.
    """

    pixels: NDArray[np.uint8]
    image_size: tuple[int, int]
    input_size: tuple[int, int]
    orientation: int


def prepare_image(data: bytes, limits: ImageLimits, crop: Crop | None = None) -> PreparedImage:
    """Decode, turn upright, crop and resize an image file.

    The first frame of an animation is used. Alpha is ignored: the colour under it is kept. 16-bit samples keep their
    upper 8 bits. Colour profiles are ignored, as `segment_anything` does.

    Raises:
        InvalidArgument: field "image" or "crop"; the description names the limit.

    Source: ResizeLongestSide.apply_image in segment_anything/utils/transforms.py (Pillow's bilinear filter).
    """
    if not data:
        raise InvalidArgument("image", "is empty")
    if len(data) > limits.max_bytes:
        raise InvalidArgument("image", f"has {len(data)} bytes, at most {limits.max_bytes} are accepted")
    image_format = identify_format(data)
    if image_format not in limits.formats:
        raise InvalidArgument("image", f"is not one of {', '.join(limits.formats)}")
    try:
        image, orientation = _open(data, image_format, limits)
        upright_size = image.size[::-1] if orientation in _SIDES_SWAPPED else image.size
        image_size = upright_size if crop is None else _crop_size(crop, upright_size)
        input_size = fit_input_size(*image_size)
        upright = _turn_upright(_to_rgb(image), orientation)
    except DamagedImage as error:
        raise InvalidArgument("image", f"cannot be decoded as {image_format}: {error}") from error
    except DECODER_ERRORS as error:
        raise InvalidArgument("image", f"cannot be decoded as {image_format}: damaged or cut short") from error
    if crop is not None:
        upright = upright.crop(crop)
    pixels = np.array(upright.resize(input_size, Image.Resampling.BILINEAR))
    return PreparedImage(pixels, image_size, input_size, orientation)


def _open(data: bytes, image_format: str, limits: ImageLimits) -> tuple[ImageFile.ImageFile, int]:
    """Read the header and check it; nothing is decoded yet. Returns the orientation (0 to 8) too."""
    orientation = 0
    if image_format == WEBP:
        _check_pixels(*read_webp_size(data), limits)
    else:
        data, orientation = strip_jpeg(data) if image_format == JPEG else strip_png(data)
    image = _OPENERS[image_format](BytesIO(data))
    # The file at once, not 64 KiB at a time: between two parts the interpreter is wanted back, and others hold it.
    image.decodermaxblock = len(data)
    _check_pixels(*image.size, limits)
    if image_format == WEBP:
        orientation = read_orientation(image.info.get("exif", b""))
    return image, orientation


def _check_pixels(width: int, height: int, limits: ImageLimits) -> None:
    if width < 1 or height < 1:
        raise InvalidArgument("image", f"is {width} x {height} pixels, at least 1 x 1 is needed")
    if width * height > limits.max_pixels:
        raise InvalidArgument("image", f"is {width} x {height} pixels, at most {limits.max_pixels} in all are accepted")


def _crop_size(crop: Crop, image_size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of a crop that lies in the image."""
    x0, y0, x1, y1 = crop
    width, height = image_size
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise InvalidArgument("crop", f"must lie in the image, 0,0 to {width},{height}, and hold a pixel; got {crop}")
    return x1 - x0, y1 - y0


def fit_input_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) after resizing; the arithmetic of ResizeLongestSide.get_preprocess_shape, rounding included."""
    scale = IMAGE_SIDE_PX * 1.0 / max(width, height)
    size = int(width * scale + 0.5), int(height * scale + 0.5)
    if min(size) < 1:
        message = f"is {width} x {height} pixels, the longer side may be at most {MAX_ASPECT_RATIO} times the shorter"
        raise InvalidArgument("image", message)
    return size


def _to_rgb(image: Image.Image) -> Image.Image:
    """Decode to RGB; the colour of transparent pixels is kept."""
    image.load()
    # A transparent colour in the header would make the conversion warn or look for a replacement.
    image.info.pop("transparency", None)
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def _turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    step = _TO_UPRIGHT.get(orientation)
    return image if step is None else image.transpose(step)
