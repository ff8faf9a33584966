"""How embeddings and logits are written into the cache: a verified header and little-endian numbers.

Layout: a fixed header (magic, schema version, codec, orientation, tenant tag, key, model id, shape, sizes,
payload length, CRC-32 of the payload, CRC-32 of the header), then the payload in C order. Whatever does not
verify is no record.
"""

import struct
import zlib
from dataclasses import dataclass

import torch

from splitsam.common.codecs import CODECS, Codec
from splitsam.common.keys import KEY_BYTES, SCHEMA_VERSION, Address
from splitsam.common.shapes import IMAGE_SIDE_PX

_HEADER = struct.Struct("<4sHBB16s32s32s3I2I2III")
HEADER_BYTES = _HEADER.size + 4
_LAST_ORIENTATION = 8  # of EXIF
_CODECS = {codec.number: codec for codec in CODECS.values()}


class BadRecord(Exception):
    """The bytes are not the record that was asked for."""


@dataclass(frozen=True)
class Size:
    """Width and height in pixels."""

    width: int
    height: int

    @property
    def rows_columns(self) -> tuple[int, int]:
        """(height, width), the order of arrays."""
        return self.height, self.width


@dataclass(frozen=True)
class RecordHeader:
    """What a record says of itself.

    Args:
        kind: four bytes, EMBEDDING or LOGITS.
        address: tenant tag and key the record was stored under.
        model_id: 64 hex digits.
        codec: of the numbers.
        shape: (256, 64, 64) for an embedding, (1, 256, 256) for logits.
        image_size: the upright image.
        input_size: after resizing, before padding.
        orientation: EXIF 0 to 8, 0 when the image had none.
    """

    kind: bytes
    address: Address
    model_id: str
    codec: Codec
    shape: tuple[int, int, int]
    image_size: Size
    input_size: Size
    orientation: int

    @property
    def payload_bytes(self) -> int:
        return self.codec.payload_bytes(self.shape)


EMBEDDING = b"SSEM"
LOGITS = b"SSLG"
SHAPES = {EMBEDDING: (256, 64, 64), LOGITS: (1, 256, 256)}


def pack_record(header: RecordHeader, values: torch.Tensor) -> bytes:
    """Write a record.

    Args:
        values: header.shape, any float dtype, on the CPU; finite values saturate at what the codec holds.

    Raises:
        ValueError: the shape is not the header's.
    """
    if tuple(values.shape) != header.shape:
        raise ValueError(f"a record of shape {header.shape} cannot hold {tuple(values.shape)}")
    payload = header.codec.write(values)
    fields = _HEADER.pack(
        header.kind,
        SCHEMA_VERSION,
        header.codec.number,
        header.orientation,
        header.address.tenant_tag,
        header.address.key,
        bytes.fromhex(header.model_id),
        *header.shape,
        header.image_size.width,
        header.image_size.height,
        header.input_size.width,
        header.input_size.height,
        len(payload),
        zlib.crc32(payload),
    )
    return b"".join((fields, zlib.crc32(fields).to_bytes(4, "little"), payload))


def unpack_header(data: bytes, kind: bytes, address: Address, size_bytes: int) -> RecordHeader:
    """Read and verify a record's header alone.

    Args:
        data: at least the first HEADER_BYTES of the record.
        size_bytes: the length of the whole record as stored.

    Raises:
        BadRecord: it is damaged, of another schema, or not the record of this kind and address.
    """
    if len(data) < HEADER_BYTES:
        raise BadRecord(f"{len(data)} bytes are too short for a header")
    fields = data[: _HEADER.size]
    if zlib.crc32(fields) != int.from_bytes(data[_HEADER.size : HEADER_BYTES], "little"):
        raise BadRecord("the header's checksum is wrong")
    magic, version, codec, orientation, tag, key, model_id, *numbers = _HEADER.unpack(fields)
    if magic != kind or version != SCHEMA_VERSION or codec not in _CODECS:
        raise BadRecord(f"kind {magic!r}, schema {version}, codec {codec} is not readable here")
    if Address(tag, key) != address:
        raise BadRecord("the record belongs to another tenant or key")
    header = RecordHeader(
        kind=magic,
        address=address,
        model_id=model_id.hex(),
        codec=_CODECS[codec],
        shape=(numbers[0], numbers[1], numbers[2]),
        image_size=Size(numbers[3], numbers[4]),
        input_size=Size(numbers[5], numbers[6]),
        orientation=orientation,
    )
    if header.shape != SHAPES[kind] or numbers[7] != header.payload_bytes:
        raise BadRecord(f"shape {header.shape} with {numbers[7]} bytes is not readable here")
    if min(numbers[3:7]) < 1 or max(numbers[5:7]) > IMAGE_SIDE_PX or orientation > _LAST_ORIENTATION:
        raise BadRecord(f"no image is {header.image_size}, {header.input_size}, orientation {orientation}")
    if size_bytes != HEADER_BYTES + header.payload_bytes:
        raise BadRecord(f"{size_bytes} bytes where {HEADER_BYTES + header.payload_bytes} belong")
    return header


def unpack_record(data: bytes, kind: bytes, address: Address) -> tuple[RecordHeader, torch.Tensor]:
    """Read and verify a whole record.

    Returns:
        The header and its values: header.shape, header.codec.dtype, on the CPU.

    Raises:
        BadRecord: as unpack_header, or the payload's checksum is wrong.
    """
    header = unpack_header(data, kind, address, len(data))
    payload = bytearray(memoryview(data)[HEADER_BYTES:])
    if zlib.crc32(payload) != struct.unpack_from("<I", data, _HEADER.size - 4)[0]:
        raise BadRecord("the payload's checksum is wrong")
    return header, header.codec.read(payload, header.shape)


def parse_key(text: str) -> bytes | None:
    """The bytes of a key or token written as 64 lower-case hex digits, or None."""
    if len(text) != 2 * KEY_BYTES or not set(text) <= set("0123456789abcdef"):
        return None
    return bytes.fromhex(text)
