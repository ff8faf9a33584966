"""What an image file says of itself, read before any decoder sees it: format, size, orientation.

Pillow warns about odd EXIF data and broken animations, and Python's warning filters belong to the whole process, not to
a thread; so the parts that could make it warn are read here and taken out. The pixels are not touched.
"""

import re
import struct
from collections.abc import Iterator

from splitsam.common.shapes import IMAGE_FORMATS

JPEG, PNG, WEBP = IMAGE_FORMATS

# A progressive scan passes over all pixels and may take 100 bytes: unbounded, a small file decodes for hours.
MAX_JPEG_SCANS = 100
# Segments or chunks; each takes an interpreter's step here and another in Pillow.
MAX_PARTS = 100_000
_EXIF_PREFIX = b"Exif\0\0"
_ORIENTATION_TAG, _SHORT, _LONG = 0x0112, 3, 4
# A segment's marker: not padding (FF), an escape (00) or a marker that stands alone (01, D0 to D8).
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")
_JPEG_START_OF_SCAN, _JPEG_APP1 = 0xDA, 0xE1
_JPEG_END = b"\xff\xd9"
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_METADATA = frozenset(range(0xE1, 0xF0)) - {0xEE} | {0xFE}
_PNG_ANIMATION = (b"acTL", b"fcTL", b"fdAT")


class DamagedImage(ValueError):
    """The file's structure is broken or hostile; the message says how."""


def identify_format(data: bytes) -> str | None:
    """JPEG, PNG or WEBP by the file's first bytes; None for anything else."""
    if data.startswith(b"\xff\xd8\xff"):
        return JPEG
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PNG
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WEBP
    return None


def guess_pixels(data: bytes) -> int:
    """Width times height by the header, to tell large from small; 0 without one. Whoever decodes looks more closely."""
    try:
        match identify_format(data):
            case "JPEG":
                width, height = _read_jpeg_size(data)
            case "PNG":
                width, height = struct.unpack_from(">II", data, 16)
            case "WEBP":
                width, height = read_webp_size(data)
            case _:
                return 0
    except (DamagedImage, struct.error):
        return 0
    return width * height


def _jpeg_markers(data: bytes) -> Iterator[tuple[int, int]]:
    """Markers of segments and where they stand, to the first scan.

    Source: ITU-T T.81, B.1.1.
    """
    position = 2
    for _ in range(MAX_PARTS):
        match = _JPEG_MARKER.search(data, position)
        if match is None:
            return
        yield match[1][0], match.start()
        if match[1][0] == _JPEG_START_OF_SCAN:
            return
        position = match.start() + 2 + int.from_bytes(data[match.start() + 2 : match.start() + 4], "big")


def _read_jpeg_size(data: bytes) -> tuple[int, int]:
    """Source: ITU-T T.81, B.2.2."""
    for marker, start in _jpeg_markers(data):
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, start + 5)
            return width, height
    raise DamagedImage("the JPEG has no frame")


def find_jpeg_end(data: bytes) -> int | None:
    """Where a JPEG of one scan ends; None when it has more scans, or is cut short."""
    for marker, start in _jpeg_markers(data):
        if marker == _JPEG_START_OF_SCAN:
            # In the data of a scan 0xFF is always escaped.
            end = data.find(_JPEG_END, start)
            return end + len(_JPEG_END) if end >= 0 and data.count(b"\xff\xda", start, end) == 1 else None
    return None


def read_orientation(exif: bytes) -> int:
    """The orientation in an EXIF block: 1 to 8, or 0 when it is absent or makes no sense.

    Source: TIFF 6.0, section 2, and EXIF 2.32, tag 274.
    """
    tiff = exif.removeprefix(_EXIF_PREFIX)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 0
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, kind, _ = struct.unpack_from(order + "HHI", tiff, entry)
            if tag == _ORIENTATION_TAG and kind in (_SHORT, _LONG):
                (value,) = struct.unpack_from(order + ("H" if kind == _SHORT else "I"), tiff, entry + 8)
                return value if 1 <= value <= 8 else 0
    except struct.error:
        pass
    return 0


def strip_jpeg(data: bytes) -> tuple[bytes, int]:
    """Take the metadata out of a JPEG: the file without it, and the orientation (0 to 8) that it held.

    What tells a decoder the colours stays: JFIF (APP0) and Adobe (APP14).

    Raises:
        DamagedImage: no image data, a broken segment, or more than `MAX_JPEG_SCANS` scans.
    """
    kept = [data[:2]]
    orientation = 0
    position = 2
    while (match := _JPEG_MARKER.search(data, position)) and len(kept) < MAX_PARTS:
        start, marker = match.start(), match[1][0]
        if marker == _JPEG_START_OF_SCAN:
            # In the data of a scan 0xFF is always escaped, so this counts scans (and those of an appended picture).
            if data.count(b"\xff\xda", start) > MAX_JPEG_SCANS:
                raise DamagedImage(f"a JPEG may have {MAX_JPEG_SCANS} scans")
            return b"".join((*kept, data[start:])), orientation
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        if end < start + 4 or end > len(data):
            raise DamagedImage("a JPEG segment is broken")
        if marker == _JPEG_APP1 and orientation == 0 and data.startswith(_EXIF_PREFIX, start + 4):
            orientation = read_orientation(data[start + 4 : end])
        if marker not in _JPEG_METADATA:
            kept.append(data[start:end])
        position = end
    raise DamagedImage("the JPEG has no image data, or too many segments before it")


def strip_png(data: bytes) -> tuple[bytes, int]:
    """Take the animation out of a PNG: the file with its still picture, and the orientation (0 to 8) in its eXIf chunk.

    Raises:
        DamagedImage: a chunk is cut short.
    """
    kept = [data[:8]]
    orientation = 0
    position = 8
    while position < len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        end = position + 12 + length
        if end > len(data) or len(kept) == MAX_PARTS:
            raise DamagedImage("the PNG is cut short or in too many pieces")
        if kind == b"eXIf" and orientation == 0:
            orientation = read_orientation(data[position + 8 : end - 4])
        if kind not in _PNG_ANIMATION:
            kept.append(data[position:end])
        position = end
        if kind == b"IEND":
            break
    return b"".join(kept), orientation


def read_webp_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels of a WebP's canvas. Its decoder reserves the canvas as soon as it is made.

    Source: RFC 9649, section 2.5 to 2.7; RFC 6386, section 9.1.

    Raises:
        DamagedImage: none of the three headers.
    """
    kind, header = data[12:16], data[20:30]
    if kind == b"VP8X" and len(header) == 10:
        return 1 + int.from_bytes(header[4:7], "little"), 1 + int.from_bytes(header[7:10], "little")
    if kind == b"VP8 " and len(header) == 10 and header[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack("<HH", header[6:10])
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and len(header) >= 5 and header[0] == 0x2F:
        bits = int.from_bytes(header[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    raise DamagedImage("the WebP header is broken")
