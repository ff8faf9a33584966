"""Image bytes to encoder pixels: as segment_anything for every format, mode and orientation; the rest refused."""

import random
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import torchvision_shim  # noqa: F401
from PIL import Image, ImageOps

from splitsam.common import sam_modules  # noqa: F401
from splitsam.common.errors import InvalidArgument
from splitsam.encoder_service.image_header import (
    DamagedImage,
    guess_pixels,
    read_orientation,
    read_webp_size,
    strip_jpeg,
)
from splitsam.encoder_service.preprocess import ImageLimits, prepare_image

LIMITS = ImageLimits()
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True, "exact": True}}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth gradients with noise on top: every resampling mistake shows."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, width)[None, :, None] * np.linspace(0.2, 1, height)[:, None, None]
    return Image.fromarray((ramp + rng.integers(0, 55, (height, width, 3))).astype(np.uint8))


def encoded(image: Image.Image, image_format: str = "PNG", **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def as_segment_anything(image: Image.Image) -> np.ndarray:
    from segment_anything.utils.transforms import ResizeLongestSide

    return ResizeLongestSide(1024).apply_image(np.asarray(image))


def exif_block(orientation: int, order: str = "<", kind: int = 3) -> bytes:
    """A minimal EXIF block: one unrelated tag, then the orientation."""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    value = struct.pack(order + ("HH" if kind == 3 else "I"), *((orientation, 0) if kind == 3 else (orientation,)))
    entries = struct.pack(order + "HHI", 0x0100, 3, 1) + bytes(4) + struct.pack(order + "HHI", 0x0112, kind, 1) + value
    return b"Exif\0\0" + mark + struct.pack(order + "IH", 8, 2) + entries + bytes(4)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


@pytest.mark.parametrize("size", [(1, 1), (37, 501), (501, 37), (1024, 768), (1024, 1024), (1023, 5), (2000, 1333)])
@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_pixels_are_those_of_segment_anything(image_format: str, size: tuple[int, int]):
    data = encoded(picture(*size), image_format, **LOSSLESS.get(image_format, {"quality": 90}))
    prepared = prepare_image(data, LIMITS)
    expected = as_segment_anything(Image.open(BytesIO(data)).convert("RGB"))
    assert np.array_equal(prepared.pixels, expected)
    assert (prepared.pixels.dtype, prepared.orientation) == (np.uint8, 0)
    assert prepared.image_size == size
    assert prepared.input_size == expected.shape[1::-1]
    assert max(prepared.input_size) == 1024


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_orientation_gives_the_pixels_of_the_upright_picture(image_format: str, orientation: int):
    upright = picture(300, 170)
    # The stored picture is the one that this orientation turns upright: undo it by the opposite turn.
    opposite = {6: 8, 8: 6}.get(orientation, orientation)
    turn = Image.Exif()
    turn[0x0112] = opposite
    upright.info["exif"] = turn.tobytes()
    stored = ImageOps.exif_transpose(upright)
    data = encoded(stored, image_format, exif=exif_block(orientation), **LOSSLESS[image_format])
    prepared = prepare_image(data, LIMITS)
    assert np.array_equal(prepared.pixels, as_segment_anything(upright))
    assert (prepared.image_size, prepared.input_size) == ((300, 170), (1024, 580))
    assert prepared.orientation == orientation


@pytest.mark.parametrize("crop", [(0, 0, 300, 170), (0, 0, 151, 86), (149, 84, 300, 170), (299, 0, 300, 1)])
def test_crop_gives_the_pixels_of_that_part_of_the_upright_picture(crop: tuple[int, int, int, int]):
    upright = picture(300, 170)
    data = encoded(upright.transpose(Image.Transpose.ROTATE_90), exif=exif_block(6))
    prepared = prepare_image(data, LIMITS, crop)
    expected = as_segment_anything(upright.crop(crop))
    assert np.array_equal(prepared.pixels, expected)
    assert prepared.image_size == (crop[2] - crop[0], crop[3] - crop[1])
    assert prepared.input_size == expected.shape[1::-1]
    assert prepared.orientation == 6


@pytest.mark.parametrize("crop", [(0, 0, 0, 0), (10, 0, 10, 20), (0, 20, 10, 10), (0, 0, 301, 170), (0, 0, 170, 300)])
def test_crop_outside_the_upright_picture_is_refused_with_its_size(crop: tuple[int, int, int, int]):
    data = encoded(picture(300, 170).transpose(Image.Transpose.ROTATE_90), exif=exif_block(6))
    with pytest.raises(InvalidArgument, match="300,170") as refused:
        prepare_image(data, LIMITS, crop)
    assert refused.value.violations[0].field == "crop"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", "<>")
def test_jpeg_orientation_agrees_with_pillow(order: str, orientation: int):
    data = encoded(picture(80, 50), "JPEG", exif=exif_block(orientation, order))
    prepared = prepare_image(data, LIMITS)
    upright = ImageOps.exif_transpose(Image.open(BytesIO(data)))
    assert np.array_equal(prepared.pixels, as_segment_anything(upright))
    assert (prepared.image_size, prepared.orientation) == (upright.size, orientation)


@pytest.mark.parametrize(
    ("exif", "orientation"),
    [
        (b"", 0),
        (b"Exif\0\0", 0),
        (b"nonsense", 0),
        (exif_block(6)[6:], 6),
        (exif_block(6, kind=4), 6),
        (exif_block(6, ">", kind=4), 6),
        (exif_block(0), 0),
        (exif_block(9), 0),
        (exif_block(6)[:30], 0),
        (exif_block(6, kind=2), 0),
        (b"II*\0\xff\xff\xff\xff", 0),
    ],
)
def test_odd_exif_is_no_orientation(exif: bytes, orientation: int):
    assert read_orientation(exif) == orientation


def test_damaged_metadata_does_no_harm_and_warns_nobody():
    exif = exif_block(6)[:20] + b"\xff" * 40
    jpeg = encoded(picture(30, 20), "JPEG", exif=exif)
    mpf = b"\xff\xe2\x00\x0aMPF\0damn"
    prepared = prepare_image(jpeg[:2] + b"\xff\xff" + mpf + jpeg[2:], LIMITS)
    assert np.array_equal(prepared.pixels, prepare_image(encoded(picture(30, 20), "JPEG"), LIMITS).pixels)


def in_mode(mode: str) -> Image.Image:
    image = picture(64, 48)
    if mode in ("LA", "RGBA"):
        image = image.convert(mode)
        image.putalpha(Image.fromarray(np.arange(64 * 48).reshape(48, 64).astype(np.uint8)))
        return image
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 256 + 200)
    return image.quantize(60) if mode == "P" else image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "image_format"),
    [(mode, "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
    + [(mode, "WEBP") for mode in ("L", "RGB", "RGBA")]
    + [(mode, "JPEG") for mode in ("L", "RGB", "CMYK")],
)
def test_every_mode_becomes_rgb(mode: str, image_format: str):
    image = in_mode(mode)
    data = encoded(image, image_format, **LOSSLESS.get(image_format, {"quality": 95}))
    if mode in ("LA", "RGBA"):
        expected = Image.merge("RGB", [image.getchannel(band) for band in ("LLL" if mode == "LA" else "RGB")])
    elif mode == "I;16":
        expected = in_mode("RGB").convert("L").convert("RGB")
    else:
        expected = (Image.open(BytesIO(data)) if image_format == "JPEG" else image).convert("RGB")
    assert np.array_equal(prepare_image(data, LIMITS).pixels, as_segment_anything(expected))


@pytest.mark.parametrize("transparency", [7, bytes(range(60))])
def test_transparent_palette_keeps_its_colours(transparency: int | bytes):
    data = encoded(in_mode("P"), transparency=transparency)
    assert np.array_equal(prepare_image(data, LIMITS).pixels, as_segment_anything(in_mode("P").convert("RGB")))


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_animation_is_its_first_frame(image_format: str):
    first, second = picture(60, 40, seed=1), picture(60, 40, seed=2)
    data = encoded(first, image_format, save_all=True, append_images=[second], **LOSSLESS[image_format])
    assert np.array_equal(prepare_image(data, LIMITS).pixels, as_segment_anything(first))


def test_broken_animation_is_the_still_picture():
    png = encoded(picture(9, 9))
    data = png[:33] + png_chunk(b"acTL", bytes(8)) + png_chunk(b"acTL", bytes(8)) + png[33:]
    assert np.array_equal(prepare_image(data, LIMITS).pixels, prepare_image(png, LIMITS).pixels)


def text_bomb() -> bytes:
    text = png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(64 * 2**20), 9))
    return png_header(8, 8) + text + encoded(picture(8, 8))[33:]


def scans_bomb() -> bytes:
    jpeg = encoded(picture(64, 64), "JPEG", progressive=True)
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:-2] + jpeg[last:-2] * 200 + jpeg[-2:]


WEBP_HUGE = b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff\x3f\0" * 2
WEBP_FLAT = b"RIFF\x16\0\0\0WEBPVP8 \x0a\0\0\0\0\0\0\x9d\x01\x2a\x05\0\0\0"
BAD_IMAGES = {
    "empty": (b"", "is empty"),
    "text": (b"hello", "is not one of JPEG, PNG, WEBP"),
    "gif": (encoded(picture(4, 4), "GIF"), "is not one of"),
    "tiff": (encoded(picture(4, 4), "TIFF"), "is not one of"),
    "too many bytes": (bytes(2**25 + 1), "has 33554433 bytes, at most 33554432"),
    "png header of 20000 x 20000": (png_header(20_000, 20_000) + png_chunk(b"IDAT", b""), "at most 64000000 in all"),
    "png header of 100 Mpx": (png_header(10_000, 10_000) + png_chunk(b"IDAT", b""), "is 10000 x 10000 pixels"),
    "png without width": (png_header(0, 5) + png_chunk(b"IDAT", b""), "cannot be decoded as PNG"),
    "webp without height": (WEBP_FLAT, "is 5 x 0 pixels, at least 1 x 1 is needed"),
    "png without data": (png_header(5, 5), "cannot be decoded as PNG"),
    "png signature alone": (png_header(5, 5)[:8], "cannot be decoded as PNG"),
    "png cut short": (encoded(picture(50, 50))[:-900], "cannot be decoded as PNG"),
    "png text bomb": (text_bomb(), "cannot be decoded as PNG"),
    "png 16383 x 1": (encoded(Image.new("RGB", (16_383, 1))), "at most 2048 times the shorter"),
    "jpeg 1 x 2049": (encoded(Image.new("L", (1, 2049)), "JPEG"), "at most 2048 times the shorter"),
    "jpeg cut short": (encoded(picture(50, 50), "JPEG")[:-100], "cannot be decoded as JPEG"),
    "jpeg signature alone": (b"\xff\xd8\xff", "has no image data"),
    "jpeg scans bomb": (scans_bomb(), "a JPEG may have 100 scans"),
    "jpeg segment past the end": (b"\xff\xd8\xff\xe0\xff\xff", "a JPEG segment is broken"),
    "webp canvas of 268 Mpx": (WEBP_HUGE, "is 16384 x 16384 pixels"),
    "webp cut short": (encoded(picture(50, 50), "WEBP")[:-50], "cannot be decoded as WEBP"),
    "webp signature alone": (b"RIFF\0\0\0\0WEBP", "the WebP header is broken"),
}


@pytest.mark.parametrize(("data", "complaint"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_bad_image_is_refused_by_field_and_limit(data: bytes, complaint: str):
    with pytest.raises(InvalidArgument) as caught:
        prepare_image(data, LIMITS)
    (violation,) = caught.value.violations
    assert violation.field == "image"
    assert complaint in violation.description


def test_limits_are_settings_and_inclusive():
    data = encoded(picture(20, 10))
    exact = ImageLimits(max_bytes=len(data), max_pixels=200, formats=("PNG",))
    assert prepare_image(data, exact).image_size == (20, 10)
    for narrower in (
        ImageLimits(max_bytes=len(data) - 1),
        ImageLimits(max_pixels=199),
        ImageLimits(formats=("JPEG",)),
    ):
        with pytest.raises(InvalidArgument):
            prepare_image(data, narrower)


def test_longest_accepted_ratio_keeps_one_pixel():
    assert prepare_image(encoded(Image.new("RGB", (2048, 1))), LIMITS).input_size == (1024, 1)


def test_scan_limit_leaves_ordinary_progressive_files_alone():
    data = encoded(picture(64, 64), "JPEG", progressive=True)
    assert strip_jpeg(data)[0].count(b"\xff\xda") > 5
    assert prepare_image(data, LIMITS).image_size == (64, 64)


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": exif_block(1)}])
def test_webp_size_is_read_from_each_kind_of_header(options: dict):
    assert read_webp_size(encoded(picture(321, 123), "WEBP", **options)) == (321, 123)


@pytest.mark.parametrize(
    ("image_format", "options"),
    [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True, "exif": exif_block(6)}), ("WEBP", {})],
)
def test_pixels_are_guessed_from_the_header_of_every_format(image_format: str, options: dict):
    data = encoded(picture(301, 200), image_format, **options)
    assert guess_pixels(data) == 301 * 200
    assert [guess_pixels(data[:size]) for size in (0, 3, 16, 20)] == [0] * 4
    assert guess_pixels(b"no image") == 0


def test_webp_size_of_a_foreign_header_is_refused():
    with pytest.raises(DamagedImage):
        read_webp_size(b"RIFF\0\0\0\0WEBPVP9 " + bytes(30))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_damaged_files_decode_or_are_refused_and_nothing_else(image_format: str):
    rng = random.Random(image_format)
    data = encoded(picture(24, 18), image_format, exif=exif_block(6))
    small = ImageLimits(max_pixels=100_000)
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 6)):
            damaged[rng.randrange(len(data))] = rng.choice((0, 0xFF, rng.randrange(256)))
        try:
            prepare_image(bytes(damaged[: rng.choice((len(data), rng.randrange(len(data))))]), small)
        except InvalidArgument:
            continue
