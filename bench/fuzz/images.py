"""Image files: whole ones of every format and mode, with parts dropped, doubled, resized and damaged."""

import functools
import io
import struct
import zlib
from collections.abc import Callable
from random import Random

from PIL import Image

from bench.fuzz.mutate import EXTREME_INTS, mutate
from bench.fuzz.target import Broken, refusal
from splitsam.common.errors import InvalidArgument
from splitsam.common.keys import Crop
from splitsam.common.shapes import IMAGE_SIDE_PX
from splitsam.encoder_service.image_header import (
    DamagedImage,
    guess_pixels,
    identify_format,
    read_orientation,
    read_webp_size,
    strip_jpeg,
    strip_png,
)
from splitsam.encoder_service.preprocess import ImageLimits, prepare_image

LIMITS = ImageLimits(max_bytes=2**18, max_pixels=250_000)
_PNG_SIGNATURE_BYTES, _RIFF_BYTES = 8, 12
_SIDES = (0, 1, 2, 2047, 2048, 2049, 16383, 16384, 65535, 2**24 - 1, 2**31 - 1, 2**32 - 1)


@functools.cache
def seeds() -> tuple[bytes, ...]:
    """Small valid files: the formats that are accepted in all their kinds, then some of those that are not."""
    random = Random(1)
    exif = _exif(6)

    def picture(mode: str = "RGB", size: tuple[int, int] = (24, 18)) -> Image.Image:
        image = Image.frombytes("RGB", size, random.randbytes(3 * size[0] * size[1]))
        if mode == "I;16":
            return Image.frombytes("I;16", size, random.randbytes(2 * size[0] * size[1]))
        return image.quantize(30) if mode == "P" else image.convert(mode)

    files = [_file(picture(mode), "JPEG", exif=exif) for mode in ("RGB", "L", "CMYK")]
    files += [_file(picture(), "JPEG", progressive=True), _file(picture(), "JPEG", quality=5, comment=b"hello")]
    files += [_file(picture(mode), "PNG", exif=exif) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
    files += [_file(picture("P"), "PNG", transparency=bytes(range(30))), _file(picture("L"), "PNG", transparency=9)]
    files += [_file(picture(mode), "WEBP", exif=exif) for mode in ("L", "RGB", "RGBA")]
    files += [_file(picture(mode), "WEBP", lossless=True) for mode in ("RGB", "RGBA")]
    files += [_file(picture(), "WEBP"), _file(picture(size=(200, 1)), "PNG"), _file(picture(size=(1, 300)), "JPEG")]
    files += [_file(picture(), name, save_all=True, append_images=[picture()]) for name in ("PNG", "WEBP", "MPO")]
    return (*files, *(_file(picture(), name) for name in ("GIF", "BMP", "TIFF", "PPM", "ICO")), b"", exif)


def make(random: Random) -> bytes:
    """A file with its parts rearranged, its sizes lied about, its bytes damaged, or some of these."""
    data = random.choice(seeds())
    for _ in range(random.choice((0, 1, 1, 2))):
        data = random.choice(_REWRITES)(random, data)
    if random.random() < 0.6:
        data = mutate(random, data, seeds(), longest=LIMITS.max_bytes + 100)
    return data


def check(data: bytes, crop: Crop | None = None) -> str:
    """`prepare_image`: pixels as the encoder takes them, or a refusal of the image or of the crop of it."""
    try:
        prepared = prepare_image(data, LIMITS, crop)
    except InvalidArgument as error:
        return refusal(error, lambda field: field == "image" or (field == "crop" and crop is not None))
    width, height = prepared.input_size
    if prepared.pixels.shape != (height, width, 3) or prepared.pixels.dtype != "uint8":
        raise Broken(f"pixels {prepared.pixels.shape} {prepared.pixels.dtype} for an input of {width} x {height}")
    across, down = prepared.image_size
    is_within = 1 <= across * down <= LIMITS.max_pixels and len(data) <= LIMITS.max_bytes
    if not is_within or max(width, height) != IMAGE_SIDE_PX or prepared.orientation not in range(9):
        raise Broken(f"accepted {across} x {down} pixels, orientation {prepared.orientation}, as {width} x {height}")
    if crop is not None and (across, down) != (crop[2] - crop[0], crop[3] - crop[1]):
        raise Broken(f"{across} x {down} pixels of the crop {crop}")
    return f"decoded {identify_format(data)}"


def check_headers(data: bytes) -> str:
    """What is read before any decoder: nothing is added, sizes and orientations make sense, or the file is damaged."""
    if read_orientation(data) not in range(9):
        raise Broken("an orientation that is none")
    if guess_pixels(data) < 0:
        raise Broken("a negative number of pixels")
    read = 0
    for strip in (strip_jpeg, strip_png):
        try:
            kept, orientation = strip(data)
        except DamagedImage as error:
            _check_text(str(error))
            continue
        read += 1
        if len(kept) > len(data) or orientation not in range(9):
            raise Broken(f"{len(kept)} bytes of {len(data)} kept, orientation {orientation}")
    try:
        if min(read_webp_size(data)) < 0:
            raise Broken("a negative size")
        read += 1
    except DamagedImage as error:
        _check_text(str(error))
    return "read" if read else "damaged"


def _check_text(text: str) -> None:
    if not text or not text.isprintable():
        raise Broken(f"nobody wants to read {text!r}")


def _file(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def _exif(orientation: int, order: str = "<") -> bytes:
    """A block with an unrelated tag, then the orientation."""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    entries = [struct.pack(order + "HHIHH", tag, 3, 1, value, 0) for tag, value in ((0x0100, 1), (0x0112, orientation))]
    return b"Exif\0\0" + mark + struct.pack(order + "IH", 8, 2) + b"".join(entries) + bytes(4)


def _damage_exif(random: Random, data: bytes) -> bytes:
    """Another EXIF block in place of the seeds', of the same length; the checksums around it are not mended."""
    place = data.find(b"II*\0")
    block = _exif(random.choice((*range(10), 65535)), random.choice("<>"))[6:]
    if random.random() < 0.7:
        block = mutate(random, block, [block])[: len(block)].ljust(len(block), b"\xff")
    return data if place < 0 else data[:place] + block + data[place + len(block) :]


def _claim_size(random: Random, data: bytes) -> bytes:
    """Another width and height in the header, its checksum mended."""
    width, height = random.choice(_SIDES), random.choice(_SIDES)
    copy = bytearray(data)
    image_format = identify_format(data)
    if image_format == "PNG" and len(data) > 33:
        copy[16:24] = struct.pack(">II", width, height)
        copy[29:33] = struct.pack(">I", zlib.crc32(copy[12:29]))
    elif image_format == "JPEG":
        for marker in (b"\xff\xc0", b"\xff\xc2"):
            if 0 < (place := data.find(marker)) < len(data) - 9:
                copy[place + 5 : place + 9] = struct.pack(">HH", height % 2**16, width % 2**16)
    elif image_format == "WEBP" and len(data) > 30:
        place = 24 if data[12:16] == b"VP8X" else 26 if data[12:16] == b"VP8 " else 21
        size = width.to_bytes(4, "little")[:3] + height.to_bytes(4, "little")[:3]
        copy[place : place + (6 if place == 24 else 4)] = size if place == 24 else size[:2] + size[3:5]
    return bytes(copy)


def _rearrange(random: Random, data: bytes) -> bytes:
    """Parts of the file dropped, doubled, moved or damaged inside, with right lengths and checksums around them."""
    image_format = identify_format(data)
    if image_format == "PNG":
        return data[:_PNG_SIGNATURE_BYTES] + _shuffled(random, _png_parts(data), _png_part)
    if image_format == "WEBP":
        body = data[8:_RIFF_BYTES] + _shuffled(random, _webp_parts(data), _webp_part)
        return b"RIFF" + struct.pack("<I", random.choice((len(body), len(body), 0, 2**32 - 1))) + body
    if image_format == "JPEG":
        parts, scan = _jpeg_parts(data)
        return data[:2] + _shuffled(random, parts, _jpeg_part) + scan
    return data


Part = tuple[bytes, bytes]


def _shuffled(random: Random, parts: list[Part], write: Callable[[bytes, bytes], bytes]) -> bytes:
    for _ in range(random.choice((1, 1, 2, 4))):
        if not parts:
            break
        i = random.randrange(len(parts))
        kind, content = parts[i]
        what = random.randrange(6)
        if what == 0:
            del parts[i]
        elif what == 1:
            parts[i:i] = [parts[i]] * random.choice((1, 2, 200))
        elif what == 2:
            parts.insert(random.randrange(len(parts)), parts.pop(i))
        elif what == 3:
            parts[i] = random.choice(parts)[0], content
        elif what == 4:
            parts[i] = kind, struct.pack(">I", random.choice(EXTREME_INTS)) + content[4:]
        else:
            parts[i] = kind, mutate(random, content, [content], longest=40_000)
    return b"".join(write(kind, content) for kind, content in parts)


def _png_parts(data: bytes) -> list[Part]:
    parts, position = [], _PNG_SIGNATURE_BYTES
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        parts.append((data[position + 4 : position + 8], data[position + 8 : position + 8 + length]))
        position += 12 + length
    return parts


def _png_part(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _webp_parts(data: bytes) -> list[Part]:
    parts, position = [], _RIFF_BYTES
    while position + 8 <= len(data):
        (length,) = struct.unpack_from("<I", data, position + 4)
        parts.append((data[position : position + 4], data[position + 8 : position + 8 + length]))
        position += 8 + length + length % 2
    return parts


def _webp_part(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


def _jpeg_parts(data: bytes) -> tuple[list[Part], bytes]:
    """The segments before the first scan, and the rest."""
    parts, position = [], 2
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != 0xDA:
        (length,) = struct.unpack_from(">H", data, position + 2)
        parts.append((data[position : position + 2], data[position + 4 : position + 2 + length]))
        position += 2 + length
    return parts, data[position:]


def _jpeg_part(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack(">H", (len(content) + 2) % 2**16) + content


_REWRITES = (_damage_exif, _claim_size, _rearrange, _rearrange)
